"""The only loop: it owns chunks, random numbers, checkpoints, progress, failure and counting."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from invguide.checkpoint import load_checkpoint, save_checkpoint
from invguide.devices import resolve_device
from invguide.errors import DivergenceError, InputError
from invguide.prior import Prior
from invguide.problem import Problem
from invguide.progress import progress_bar
from invguide.result import Result
from invguide.rng import Noise
from invguide.solver import Solver, check_compatible, sample_count

# A signal this many times larger than the largest noise level is lost, though not yet infinite. Other parts of a state,
# such as moments of an optimiser, have units of their own and need only be finite.
RUNAWAY = 1e4
SIGNALS = ("x", "x0", "denoised")


class StepReport(NamedTuple):
    """What a callback gets after each step; `estimate()` is in data units, (rows, *shape)."""

    step: int
    num_steps: int
    rows: tuple[tuple[int, int], ...]
    info: NamedTuple
    estimate: Callable[[], Tensor]


@dataclass
class _Chunk:
    """Samples that advance together, and where they are."""

    rows: list[tuple[int, int]]
    step: int = 0
    state: Any = None


@dataclass
class _Progress:
    """Everything that a checkpoint must hold."""

    samples: Tensor
    chi2: Tensor
    log_prob: Tensor
    log_weights: Tensor
    status: dict[tuple[int, int], str] = field(default_factory=dict)
    chunk: _Chunk | None = None
    seconds: float = 0.0
    counters: list[int] = field(default_factory=lambda: [0, 0, 0])


def run(
    solver: Solver[Any],
    problem: Problem,
    num_samples: int | None = None,
    *,
    seed: int = 0,
    batch_size: int | str = "auto",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    callbacks: Sequence[Callable[[StepReport], None]] = (),
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    on_nonfinite: str = "raise",
) -> Result:
    """Draw num_samples samples for every measurement of the problem.

    Args:
        solver: The algorithm and its hyper-parameters.
        problem: Prior, likelihood or reward.
        num_samples: Samples per measurement, 1 by default; ensemble methods return their ensemble.
        seed: Sample i of measurement b depends on (seed, b, i) only, not on how samples are batched.
        batch_size: Samples that advance together, or "auto"; of an ensemble, members in one network call.
        device: "cpu", "cuda", ...; by default CUDA where there is one.
        dtype: Type of the state; by default the prior's, but at least float32.
        progress: Show a progress bar once the run has taken two seconds.
        callbacks: Called with a StepReport after every step.
        checkpoint: File to write and, where it exists, to resume from.
        checkpoint_every: Steps between two writes.
        on_nonfinite: "raise" stops at the first sample that diverges; "drop" goes on with the others.

    Returns:
        The result; after Ctrl-C, what was finished by then, with the checkpoint written.

    Raises:
        CompatibilityError: Solver and problem do not fit (before any network call).
        DivergenceError: A sample became non-finite or left the data by orders of magnitude.
        CheckpointError: The checkpoint is damaged or belongs to other settings.
    """
    if on_nonfinite not in ("raise", "drop"):
        raise InputError(f"on_nonfinite is {on_nonfinite!r}; expected 'raise' or 'drop'")
    if checkpoint_every < 1:
        raise InputError(f"checkpoint_every is {checkpoint_every}; expected at least 1")
    num_samples = sample_count(solver, num_samples)
    check_compatible(solver, problem)
    device = resolve_device(device)
    # Whatever the network's own type, steps between neighbouring levels are lost in half precision.
    dtype = dtype or torch.promote_types(problem.prior.dtype, torch.float32)
    problem = problem.to(device, dtype)
    rows = [(b, s) for b in range(problem.num_measurements) for s in range(num_samples)]
    problem.batch_size = _chunk_size(batch_size, problem, device)
    size = num_samples if solver.requires.ensemble else problem.batch_size
    path = None if checkpoint is None else Path(checkpoint)
    identity = _identity(solver, problem, num_samples, seed, dtype)
    saved = _restore(path, identity, solver) if path is not None and path.exists() else None
    if path is not None:
        for operator in problem.operators():
            operator.keep(path.with_name(f"{path.name}.calls"))
    progress_state = saved or _Progress(
        samples=torch.full(
            (problem.num_measurements, num_samples, *problem.shape), float("nan"), dtype=dtype
        ),
        chi2=torch.full((problem.num_measurements, num_samples), float("nan"), dtype=dtype),
        log_prob=torch.full((problem.num_measurements, num_samples), float("nan"), dtype=dtype),
        log_weights=torch.zeros(problem.num_measurements, num_samples, dtype=dtype),
    )
    loop = _Loop(
        solver,
        problem,
        progress_state,
        seed,
        device,
        dtype,
        on_nonfinite,
        callbacks,
        path,
        identity,
    )
    interrupted = False
    total = len(rows) * solver.num_steps
    with torch.no_grad(), progress_bar(total, type(solver).__name__, progress) as bar:
        bar.update(len(progress_state.status) * solver.num_steps)
        try:
            if progress_state.chunk is not None:
                bar.update(progress_state.chunk.step * len(progress_state.chunk.rows))
                loop.advance(progress_state.chunk, checkpoint_every, bar)
            remaining = [r for r in rows if r not in progress_state.status]
            for start in range(0, len(remaining), size):
                loop.advance(_Chunk(remaining[start : start + size]), checkpoint_every, bar)
        except KeyboardInterrupt:
            interrupted = True
            loop.save()
    loop.stop_clock()
    return loop.result(identity, num_samples, interrupted)


@dataclass
class _Loop:
    solver: Solver[Any]
    problem: Problem
    progress: _Progress
    seed: int
    device: torch.device
    dtype: torch.dtype
    on_nonfinite: str
    callbacks: Sequence[Callable[[StepReport], None]]
    path: Path | None
    identity: dict[str, str]

    def __post_init__(self) -> None:
        self.tick = time.monotonic()
        counters = self.problem.counters
        counters.network, counters.vjp, counters.forward = self.progress.counters
        scale = self.problem.prior.sigma_max + self.problem.prior.sigma_data
        self.limit = RUNAWAY * scale
        self.operators = self.problem.operators()

    def advance(self, chunk: _Chunk, checkpoint_every: int, bar: Any) -> None:
        """Carry one chunk from where it is to the end, and store its samples."""
        solver = self.solver
        part, noise = self._bind(chunk.rows)
        if chunk.state is None:
            chunk.state = solver.init(part, noise)
            part, noise = self._drop(chunk, -1, part, noise)
        else:
            chunk.state = type(chunk.state)(*(t.to(self.device) for t in chunk.state))
        self.progress.chunk = chunk
        while chunk.rows and chunk.step < solver.num_steps:
            k = chunk.step
            before = len(chunk.rows)
            state, info = solver.step(part, chunk.state, k, noise.at(k))
            chunk.state, chunk.step = state, k + 1
            part, noise = self._drop(chunk, k, part, noise)
            bar.update(len(chunk.rows) + (before - len(chunk.rows)) * (solver.num_steps - k))
            bar.set_postfix_str(
                ", ".join(filter(None, (o.progress_text() for o in self.operators))), refresh=False
            )
            for callback in self.callbacks:
                estimate = lambda s=chunk.state: self.problem.prior.to_data(solver.estimate(s))  # noqa: E731
                callback(StepReport(k, solver.num_steps, tuple(chunk.rows), info, estimate))
            if (
                self.path is not None
                and chunk.step % checkpoint_every == 0
                and chunk.step < solver.num_steps
            ):
                self.save()
        if chunk.rows:
            self._finish(chunk, part)
        self.progress.chunk = None
        if self.path is not None:
            self.save()

    def _bind(self, rows: list[tuple[int, int]]) -> tuple[Problem, Noise]:
        index = torch.tensor([b for b, _ in rows], dtype=torch.long)
        noise = Noise(self.seed, tuple(rows), self.problem.shape, self.dtype, self.device)
        return self.problem.rows(index), noise

    def _drop(self, chunk: _Chunk, k: int, part: Problem, noise: Noise) -> tuple[Problem, Noise]:
        """Check every state tensor; raise, or take the lost samples out of the chunk."""
        lost = torch.zeros(len(chunk.rows), dtype=torch.bool)
        for name, tensor in zip(chunk.state._fields, chunk.state, strict=True):
            if name.startswith("log_"):  # of something impossible
                tensor = tensor.masked_fill(tensor == -torch.inf, 0.0)
            peak = tensor.abs().reshape(len(tensor), -1).amax(1)
            bad = ~(peak < (self.limit if name in SIGNALS else float("inf")))  # NaN compares false
            if bool(bad.any()):
                bad = bad.cpu()
                first = int(bad.nonzero()[0])
                value = float(peak[first])
                if self.on_nonfinite == "raise":
                    raise DivergenceError(self._diagnosis(name, chunk.rows[first], k, value))
                for i in bad.nonzero().flatten().tolist():
                    if not lost[i]:
                        self.progress.status[chunk.rows[i]] = (
                            f"dropped: {name} reached {float(peak[i]):g} at step {k}"
                        )
                lost |= bad
        if not bool(lost.any()):
            return part, noise
        if self.solver.requires.ensemble:
            raise DivergenceError(self._diagnosis("ensemble", chunk.rows[0], k, float("nan")))
        keep = (~lost).nonzero().flatten()
        chunk.state = type(chunk.state)(*(t[keep.to(t.device)] for t in chunk.state))
        chunk.rows = [chunk.rows[i] for i in keep.tolist()]
        return self._bind(chunk.rows)

    def _finish(self, chunk: _Chunk, part: Problem) -> None:
        x0 = self.solver.estimate(chunk.state)
        log_prob, chi2 = part.evaluate(x0)
        log_weights = self.solver.log_weights(chunk.state)
        weights = torch.zeros_like(log_prob) if log_weights is None else log_weights
        self._check_outcome(chunk, part, x0, log_prob, chi2, torch.softmax(weights, 0))
        data = part.prior.to_data(x0)
        for i, (b, s) in enumerate(chunk.rows):
            if (b, s) in self.progress.status:
                continue
            self.progress.samples[b, s] = data[i]
            self.progress.chi2[b, s], self.progress.log_prob[b, s] = chi2[i], log_prob[i]
            if log_weights is not None:
                self.progress.log_weights[b, s] = log_weights[i]
            self.progress.status[(b, s)] = "ok"

    def _check_outcome(
        self,
        chunk: _Chunk,
        part: Problem,
        x0: Tensor,
        log_prob: Tensor,
        chi2: Tensor,
        weights: Tensor,
    ) -> None:
        """A run can diverge and stay finite: samples far outside the data, or worse than no reconstruction at all.

        Of an ensemble, members of next to no weight may be anywhere, and the bad ones are dropped unless they are most.
        """
        typical = self.problem.prior.sigma_data
        rms = x0.square().flatten(1).mean(1).sqrt()
        lost = ~(rms < 5 * typical)
        if part.differentiable:  # a black box may fail on a good sample, or call it impossible
            lost |= ~torch.isfinite(log_prob)
        reference = torch.full_like(chi2, float("nan"))
        if part.likelihood is not None and self.solver.requires.target != "none":
            for b in {b for b, _ in chunk.rows}:  # one call for each measurement: they may be dear
                rows = torch.tensor([i for i, row in enumerate(chunk.rows) if row[0] == b])
                reference[rows] = part.rows(rows[:1]).evaluate(torch.zeros_like(x0[:1]))[1]
            # chi2 scatters where measurements are few.
            lost |= chi2 > 2 * reference.clamp_min(5 + 200 / part.likelihood.y[0].numel())
        drop = self.on_nonfinite == "drop"
        if self.solver.requires.ensemble:
            lost &= weights > 1e-3 / len(weights)
            drop |= bool(weights[lost].sum() < 0.5)
        for i in lost.nonzero().flatten().tolist():
            b, s = chunk.rows[i]
            text = (
                f"{type(self.solver).__name__} diverged: sample {s} of measurement {b} ends at "
                f"rms {rms[i].item():.3g} (clean signals: about {typical:.3g}), "
                f"log target {log_prob[i].item():.3g} "
                f"and chi2 {chi2[i].item():.3g} (a blank signal: {reference[i].item():.3g}). {self._cause()}"
            )
            if not drop:
                raise DivergenceError(text)
            self.progress.status[(b, s)] = "dropped: " + text

    def _diagnosis(self, name: str, row: tuple[int, int], k: int, value: float) -> str:
        where = "init" if k < 0 else f"step {k + 1} of {self.solver.num_steps}"
        return (
            f"{type(self.solver).__name__} diverged: {name} of sample {row[1]} of measurement {row[0]} "
            f"reached {value:g} at {where}. {self._cause()}"
        )

    def _cause(self) -> str:
        scale = self.solver.settings.get("guidance_scale")
        if scale:
            return (
                f"Likely cause: guidance_scale={scale:g} is too large for this operator and sigma_y; "
                f"try {scale / 10:g}."
            )
        return "Likely causes: sigma_y far too small for y, or an operator that overflows outside its domain."

    def stop_clock(self) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self.tick
        self.tick = now
        c = self.problem.counters
        self.progress.counters = [c.network, c.vjp, c.forward]

    def save(self) -> None:
        self.stop_clock()
        if self.path is None:
            return
        p = self.progress
        content: dict[str, Any] = {
            "samples": p.samples,
            "chi2": p.chi2,
            "log_prob": p.log_prob,
            "log_weights": p.log_weights,
            "status": [[b, s, text] for (b, s), text in p.status.items()],
            "seconds": p.seconds,
            "counters": p.counters,
            "chunk": None,
        }
        if p.chunk is not None and p.chunk.state is not None:
            state = {name: t.cpu() for name, t in p.chunk.state._asdict().items()}
            content["chunk"] = {
                "rows": [list(r) for r in p.chunk.rows],
                "step": p.chunk.step,
                "state": state,
            }
        save_checkpoint(self.path, self.identity, content)

    def result(self, identity: dict[str, str], num_samples: int, interrupted: bool) -> Result:
        p = self.progress
        missing = "interrupted" if interrupted else "missing"
        status = [
            [p.status.get((b, s), missing) for s in range(num_samples)]
            for b in range(self.problem.num_measurements)
        ]
        count = max(1, len(p.status))
        manifest = {
            **identity,
            "settings": self.solver.settings,
            "num_samples": num_samples,
            "seed": self.seed,
            "device": str(self.device),
            "network_calls": p.counters[0],
            "vjp_calls": p.counters[1],
            "forward_calls": p.counters[2],
            "nfe": p.counters[0] / count,
            "seconds": round(p.seconds, 3),
            "chi2": p.chi2.tolist(),
            "status": status,
            "forward_model": list(filter(None, (o.summary() for o in self.operators))),
            "versions": versions(),
        }
        y = None if self.problem.likelihood is None else self.problem.likelihood.y.cpu()
        return Result(
            p.samples,
            p.chi2,
            p.log_prob,
            status,
            p.counters[0] / count,
            p.seconds,
            manifest,
            y,
            log_weights=p.log_weights,
        )


def versions() -> dict[str, str]:
    from importlib import metadata

    found = {"python": platform.python_version()}
    for name in ("invguide", "torch", "deepinv", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def fingerprint(*tensors: Tensor) -> str:
    """Short hash of dtypes, shapes and values; of a strided part of the values where a tensor is large."""
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
        flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
        stride = max(1, flat.numel() // 65536)
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        values = flat[::stride].cpu()
        values = (
            values.float() if values.is_floating_point() and values.element_size() < 4 else values
        )
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def describe_prior(prior: Prior) -> str:
    """Return the kind, a fingerprint of the weights, the precision and the settings of a prior: all that decides D."""
    weights = fingerprint(*(t for _, t in sorted(prior.state_dict(keep_vars=True).items())))
    return f"{type(prior).__name__} {weights} {prior.precision} {prior.extra_repr()}".strip()


def _identity(
    solver: Solver[Any], problem: Problem, num_samples: int, seed: int, dtype: torch.dtype
) -> dict[str, str]:
    """What must agree for a checkpoint to be resumed."""
    identity = {
        "solver": json.dumps(solver.settings, sort_keys=True, default=str),
        "num_samples": str(num_samples),
        "seed": str(seed),
        "shape": str(tuple(problem.shape)),
        "dtype": str(dtype),
        "prior": describe_prior(problem.prior),
    }
    if problem.condition:
        identity["condition"] = fingerprint(
            *(problem.condition[k] for k in sorted(problem.condition))
        )
    likelihood = problem.likelihood
    if likelihood is not None:
        buffers = [t for _, t in sorted(likelihood.operator.state_dict().items())]
        described = " ".join(repr(likelihood.operator).split())  # its numbers; tensors follow
        identity["operator"] = f"{described} {fingerprint(*buffers)}"
        sigma = getattr(likelihood.noise, "sigma_y", None)
        identity["noise"] = type(likelihood.noise).__name__ + (
            f" {fingerprint(sigma)}" if sigma is not None else ""
        )
        identity["y"] = fingerprint(likelihood.y)
    if problem.reward is not None:
        identity["reward"] = re.sub(r" at 0x[0-9a-f]+", "", repr(problem.reward))
    return identity


def _restore(path: Path, identity: dict[str, str], solver: Solver[Any]) -> _Progress:
    content = load_checkpoint(path, identity)
    progress = _Progress(
        samples=content["samples"],
        chi2=content["chi2"],
        log_prob=content["log_prob"],
        log_weights=content["log_weights"],
        status={(b, s): text for b, s, text in content["status"]},
        seconds=content["seconds"],
        counters=content["counters"],
    )
    chunk = content["chunk"]
    if chunk is not None:
        state = solver.state_type(**chunk["state"])
        progress.chunk = _Chunk([(b, s) for b, s in chunk["rows"]], chunk["step"], state)
    return progress


def _chunk_size(batch_size: int | str, problem: Problem, device: torch.device) -> int:
    if batch_size == "auto":
        # On a CPU batching buys nothing beyond a few thousand numbers; on a GPU it does until memory is short.
        numbers = 2**16 if device.type == "cpu" else 2**22
        return max(1, numbers // max(1, torch.Size(problem.shape).numel()))
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}; expected a positive number or 'auto'")
    return batch_size
