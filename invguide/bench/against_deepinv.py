"""DPS here and in deepinv: the same network, operator, measurement and number of network calls."""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from invguide import driver
from invguide.api import load_prior
from invguide.bench.overhead import timed
from invguide.bench.protocol import Protocol, check_tasks
from invguide.diagnostics.metrics import psnr
from invguide.errors import InputError
from invguide.prior import Prior
from invguide.problem.problem import Problem
from invguide.solvers import DPS
from invguide.system.devices import resolve_device
from invguide.system.progress import progress_bar
from invguide.system.tables import Table

WEIGHTS = (100.0, 300.0, 1000.0, 3000.0, 10000.0)


class _Method(NamedTuple):
    name: str
    run: Callable[[int], Tensor]  # seed -> (1, C, H, W), data units


def peers(
    data: str | Path,
    *,
    size: int = 64,
    photos: int = 2,
    noise: float = 0.025,
    prior: str | Prior = "natural",
    task: str = "deblur",
    steps: int = 100,
    weights: Sequence[float] = WEIGHTS,
    repeats: int = 5,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> Table:
    """Run DPS of this package and of deepinv on the same measurements, in turns in one process.

    deepinv's DPS is run with its default weight, which hardly uses y, and with the best one of `weights` on these very
    photos; its other settings are its own, but for the range of noise levels (that of the prior) and single precision.

    Args:
        data, size, photos, noise, prior, seed, device, progress: As for `restore`.
        task: One task of `restore`.
        steps: Network calls of every run.
        weights: Of deepinv's DPS, to choose from.
        repeats: Pairs of runs that are timed.

    Returns:
        PSNR, chi2, network calls and time per call of each, and the time over that of this package. Where deepinv is
        not installed, the table says so.
    """
    check_tasks([task])
    if steps < 2 or not weights:
        raise InputError(
            f"steps={steps}, weights={list(weights)}; expected at least 2 steps and one weight"
        )
    where = resolve_device(device)
    protocol = Protocol(Path(data), size, photos, noise, seed)
    network = _Counted(load_prior(prior).to(where))
    likelihoods = [protocol.likelihood(task, i).to(where, torch.float32) for i in range(photos)]
    shape = tuple(protocol.truth.shape[1:])
    ours = [Problem(network, likelihood, shape=shape) for likelihood in likelihoods]
    solver = DPS(num_steps=steps)

    def run_ours(photo: int) -> Tensor:
        result = driver.run(solver, ours[photo], seed=photo, device=where, progress=False)
        return result.samples[0]

    methods = [_Method("invguide DPS", run_ours)]
    # Samplers of deepinv before 0.5 choose their own first noise level, beyond what priors are trained on.
    installed = importlib.util.find_spec("deepinv") is not None and (
        tuple(map(int, version("deepinv").split(".")[:2])) >= (0, 5)
    )
    if installed:
        physics = [x.operator.to_deepinv(noise) for x in likelihoods]
        for weight in dict.fromkeys((1.0, *weights)):
            sampler = _deepinv_dps(network, steps, weight, where)
            methods.append(
                _Method(
                    f"deepinv DPS, weight {weight:g}",
                    lambda i, sampler=sampler: sampler(
                        likelihoods[i].y, physics[i], shape, seed=i + 1
                    ),
                )
            )
    cells: dict[str, list[_Cell]] = {m.name: [] for m in methods}
    pairs: list[tuple[float, float]] = []
    total = photos * len(methods) + 2 * repeats * installed
    with progress_bar(total, "DPS against deepinv", progress) as bar:

        def measure(method: _Method, photo: int) -> _Cell:
            bar.update(1)
            return _measure(method, network, protocol, task, photo, where)

        for photo in range(photos):
            for method in methods:
                cells[method.name].append(measure(method, photo))
        best = _best(cells) if installed else ""
        for i in range(repeats * installed):
            pair = [m for m in methods if m.name in (methods[0].name, best)]
            times = {m.name: measure(m, i % photos).ms for m in (pair if i % 2 else pair[::-1])}
            pairs.append((times[methods[0].name], times[best]))
    return _table(cells, best, pairs, protocol, task)


class _Cell(NamedTuple):
    psnr: float
    chi2: float
    calls: int
    ms: float  # per call


class _Counted(Prior):
    """A prior that counts the calls of its network."""

    def __init__(self, prior: Prior) -> None:
        super().__init__()
        self.prior, self.calls = prior, 0
        for name in (
            "shape",
            "sigma_min",
            "sigma_max",
            "min_size",
            "scale",
            "shift",
            "sigma_data",
        ):
            setattr(self, name, getattr(prior, name))

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        self.calls += len(x)
        return self.prior.denoise(x, sigma, **condition)


def as_deepinv_denoiser(prior: Prior) -> Any:
    """Return the prior as a deepinv denoiser: clean signals and noise level in data units."""
    from deepinv.models import Denoiser

    class PriorDenoiser(Denoiser):
        def forward(self, x: Tensor, sigma: Any, **kwargs: Any) -> Tensor:
            level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).flatten()
            level = level.expand(len(x)) / prior.scale
            return prior.to_data(prior.denoise(prior.to_normalised(x), level))

    return PriorDenoiser()


def _deepinv_dps(
    prior: Prior, steps: int, weight: float, device: torch.device
) -> Callable[..., Tensor]:
    from deepinv.sampling import DPS as DeepinvDPS

    # deepinv's state is in [-1, 1] and its "vp" levels are sigma^2 + 1 = exp(0.1 t + 9.95 t^2): start at the top
    # of the prior's range.
    top = prior.sigma_max * prior.scale * 2
    start = (-0.1 + math.sqrt(0.01 + 4 * 9.95 * math.log1p(top**2))) / (2 * 9.95)
    levels = torch.linspace(min(1.0, start), 0, steps + 1, device=device)
    generator = torch.Generator(device)
    sampler = DeepinvDPS(
        as_deepinv_denoiser(prior),
        num_steps=steps + 1,
        weight=weight,
        device=device,
        dtype=torch.float32,
        rng=generator,
    )

    def run(y: Tensor, physics: Any, shape: tuple[int, ...], seed: int) -> Tensor:
        with torch.no_grad():
            return sampler(y, physics, x_init=(1, *shape), seed=seed, timesteps=levels)

    return run


def _measure(
    method: _Method,
    network: _Counted,
    protocol: Protocol,
    task: str,
    photo: int,
    device: torch.device,
) -> _Cell:
    found: list[Tensor] = []
    network.calls = 0
    seconds = timed(device, lambda: found.append(method.run(photo)))
    x = found[0].detach().cpu().float()
    return _Cell(
        psnr=float(psnr(x, protocol.truth[photo, None])),
        chi2=float(protocol.likelihood(task, photo).chi2(x)),
        calls=network.calls,
        ms=1000 * seconds / network.calls,
    )


def _mean(cells: list[_Cell], figure: str) -> float:
    return statistics.fmean(getattr(cell, figure) for cell in cells)


def _best(cells: dict[str, list[_Cell]]) -> str:
    """Return the name of the peer with the highest mean PSNR; the first method is ours."""
    return max(list(cells)[1:], key=lambda name: _mean(cells[name], "psnr"))


def _table(
    cells: dict[str, list[_Cell]],
    best: str,
    pairs: list[tuple[float, float]],
    protocol: Protocol,
    task: str,
) -> Table:
    rows, found = [], {}
    ours, *others = cells
    for name in dict.fromkeys((ours, *others[:1], *([best] if best else ()))):
        figures = {k: _mean(cells[name], k) for k in _Cell._fields}
        label, ratio = name, ""
        if name == best:
            label = f"{name} (best of {len(others)})"
            figures["ms"] = statistics.median(b for _, b in pairs)
            figures["ratio"] = statistics.median(a / b for a, b in pairs)
            ratio = f"{figures['ratio']:.3f}"
        elif name == ours and pairs:
            figures["ms"] = statistics.median(a for a, _ in pairs)
        found[label] = figures
        numbers = (f"{figures['psnr']:.2f}", f"{figures['chi2']:.2f}", f"{figures['calls']:.0f}")
        rows.append((label, *numbers, f"{figures['ms']:.1f}", ratio))
    head = ("method", "PSNR", "chi2", "network calls", "ms per call", "our time over it")
    notes = [
        f"{task}, {protocol.photos} photos of {protocol.size} pixels, noise {protocol.noise:g}, one sample each. A "
        "call: of the network, with all that comes with it. The weight of deepinv's DPS is the best of several on "
        f"these very photos. The ratio of times is the median of {len(pairs)} pairs measured in turns."
    ]
    if not others:
        notes = [
            "deepinv 0.5 or newer is not installed (pip install -U deepinv): nothing to compare with."
        ]
    return Table(head, tuple(rows), tuple(notes), found)
