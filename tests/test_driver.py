"""The driver: what does not change a result, what survives, and what is refused."""

from __future__ import annotations

import io
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import invguide as ig
from invguide import driver
from invguide.engine.checkpoint import DIGEST, FORMAT, MAGIC
from invguide.errors import CheckpointError, CompatibilityError, DivergenceError, InputError
from invguide.likelihood import Likelihood
from invguide.operators import GaussianBlur, Identity
from invguide.problem.problem import Problem
from invguide.solver import Solver
from invguide.solvers import DPS, HQS, DiffPIR, REDDiff, Unconditional

SOLVERS = [
    DPS(num_steps=6),
    HQS(num_steps=4),
    DiffPIR(num_steps=5),
    REDDiff(num_steps=6),
    Unconditional(num_steps=5),
]


def toy(rows: int = 3, sigma_y: float = 0.3) -> Problem:
    """In float64, so that rounding is a millionth of a millionth of anything else that could differ."""
    covariance = torch.diag(torch.tensor([1.0, 0.5, 0.3, 0.2], dtype=torch.float64))
    prior = ig.priors.Gaussian(torch.zeros(4).double(), covariance)
    y = torch.linspace(-1, 1, rows * 4).double().reshape(rows, 4)
    return Problem(prior, Likelihood(Identity(), y, sigma_y))


# Batches of another size: how a sum is vectorised depends on the shape. In float64, twenty steps of a hundred roundings
# of at most 200 (four sigma at the first level), and the steps contract: 20 * 100 * 200 * 1.1e-16 = 4e-11.
ROUNDING = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(scope="module")
def photo() -> tuple[ig.Prior, GaussianBlur, torch.Tensor]:
    prior = ig.load_prior("natural-tiny")
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, 32)[None, None, None].expand(2, 3, 32, 32)
    blur = GaussianBlur(1.0)
    return prior, blur, blur(ramp) + 0.05 * torch.randn(2, 3, 32, 32, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_batch_size_does_not_matter(
    solver: Solver, photo: tuple[ig.Prior, GaussianBlur, torch.Tensor]
) -> None:
    """A real network: the same sample alone, in threes (chunks across measurements) and in eights."""
    prior, operator, y = photo
    problem = Problem(prior, Likelihood(operator, y, 0.05))
    one, three, eight = (
        driver.run(solver, problem, 4, seed=3, batch_size=b, progress=False).samples
        for b in (1, 3, 8)
    )
    # float32 sums are reordered with the batch; anything that couples rows is a hundred times larger.
    assert (one - three).abs().max() < 1e-5
    assert (one - eight).abs().max() < 1e-5
    assert (one[:, 0] - one[:, 1]).abs().max() > 1e-4 or isinstance(solver, HQS)


def test_sample_alone_equals_sample_among_others() -> None:
    many = driver.run(DPS(num_steps=10), toy(), 5, progress=False).samples
    few = driver.run(DPS(num_steps=10), toy(), 2, progress=False).samples
    assert many.dtype == torch.float64
    assert torch.allclose(many[:, :2], few, **ROUNDING)


def test_coupled_rows_would_be_noticed() -> None:
    """The planted bug: a norm over the whole batch, as in the released DPS code."""

    class Coupled(DPS):
        def _strength(self, problem, guidance, a, b):
            return super()._strength(problem, guidance, a, b) / guidance.gradient.norm()

    solver = Coupled(num_steps=10)
    alone = driver.run(solver, toy(), 4, batch_size=1, progress=False).samples
    together = driver.run(solver, toy(), 4, batch_size=12, progress=False).samples
    assert (alone - together).abs().max() > 1e-3


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_resume_is_exact(solver: Solver, tmp_path: Path) -> None:
    """Stop with Ctrl-C in the middle of the second chunk; resume to the last bit, or with another batch size."""
    path, copy = tmp_path / "run.pt", tmp_path / "copy.pt"
    whole = driver.run(solver, toy(), 2, seed=1, batch_size=2, progress=False)
    calls = 0

    def interrupt(report: driver.StepReport) -> None:
        nonlocal calls
        calls += 1
        if calls == solver.num_steps + 3:
            raise KeyboardInterrupt

    part = driver.run(
        solver,
        toy(),
        2,
        seed=1,
        batch_size=2,
        progress=False,
        checkpoint=path,
        callbacks=[interrupt],
    )
    assert int(part.finished.sum()) == 2
    assert part.status[1] == ["interrupted"] * 2
    assert torch.equal(part.samples[0], whole.samples[0])
    assert bool(part.samples[1:].isnan().all())
    shutil.copy(path, copy)
    rest = driver.run(solver, toy(), 2, seed=1, batch_size=2, progress=False, checkpoint=path)
    assert torch.equal(rest.samples, whole.samples)
    assert rest.nfe == whole.nfe
    rest = driver.run(solver, toy(), 2, seed=1, batch_size=4, progress=False, checkpoint=copy)
    assert torch.allclose(rest.samples, whole.samples, **ROUNDING)
    assert rest.nfe == whole.nfe


KILLED = """
import os, signal, sys, torch
import invguide as ig
from invguide.operators import GaussianBlur
from invguide.solvers import DPS

def stop(report):
    if sys.argv[3] == f"{report.rows[0][1]}.{report.step}":
        os.kill(os.getpid(), signal.SIGKILL)

y = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
result = ig.solve(y, GaussianBlur(1.0), "natural-tiny", sigma_y=0.05, solver=DPS(num_steps=10), num_samples=2,
                  batch_size=1, progress=False, checkpoint=sys.argv[1] or None, checkpoint_every=3, callbacks=[stop])
torch.save(result.samples, sys.argv[2])
"""


@pytest.mark.slow
def test_kill_and_resume_and_two_processes_agree(tmp_path: Path) -> None:
    """kill -9 between two checkpoints of either sample; a second process finishes; a third ran undisturbed."""

    def start(checkpoint: Path | str, out: str, kill: str) -> int:
        command = [sys.executable, "-c", KILLED, str(checkpoint), str(tmp_path / out), kill]
        return subprocess.run(command).returncode

    assert start("", "whole.pt", "never") == 0
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    checkpoint = tmp_path / "run.pt"
    for kill in ("0.4", "1.7"):
        assert start(checkpoint, "never.pt", kill) == -signal.SIGKILL
        assert checkpoint.exists()
        assert not (tmp_path / "never.pt").exists()
    assert start(checkpoint, "resumed.pt", "never") == 0
    assert torch.equal(torch.load(tmp_path / "resumed.pt", weights_only=True), whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda: (DPS(num_steps=7), toy(), 2, 1), "solver"),
        (lambda: (DPS(num_steps=6), toy(), 2, 2), "seed"),
        (lambda: (DPS(num_steps=6), toy(), 3, 1), "num_samples"),
        (lambda: (DPS(num_steps=6), toy(sigma_y=0.4), 2, 1), "noise"),
        (lambda: (DPS(num_steps=6), toy(rows=2), 2, 1), "y"),
    ],
)
def test_resume_under_other_settings_is_refused(
    change: Callable[[], tuple], named: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.pt"
    driver.run(DPS(num_steps=6), toy(), 2, seed=1, progress=False, checkpoint=path)
    solver, problem, count, seed = change()
    with pytest.raises(CheckpointError, match=rf"belongs to another run .*{named}:"):
        driver.run(solver, problem, count, seed=seed, progress=False, checkpoint=path)


class Scorer(torch.nn.Module):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -self.weight * x.square().sum(1)


def test_resume_with_another_network_in_the_reward_is_refused(tmp_path: Path) -> None:
    """Rewards print their networks by class alone; the weights are told apart too."""
    prior, path = toy().prior, tmp_path / "run.pt"

    def guide(weight: float) -> ig.Result:
        reward = 0.5 * ig.as_reward(Scorer(weight))
        return ig.guide(
            prior, reward, solver=DPS(num_steps=6), seed=0, progress=False, checkpoint=path
        )

    first = guide(1.0)
    assert torch.equal(guide(1.0).samples, first.samples)
    with pytest.raises(CheckpointError, match=r"belongs to another run .*reward:"):
        guide(1.5)


def test_truncated_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    driver.run(DPS(num_steps=6), toy(), progress=False, checkpoint=path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="truncated"):
        driver.run(DPS(num_steps=6), toy(), progress=False, checkpoint=path)


def test_checkpoint_holds_no_pickled_code(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    driver.run(REDDiff(num_steps=6), toy(), progress=False, checkpoint=path, checkpoint_every=2)
    body = io.BytesIO(path.read_bytes()[len(MAGIC) + DIGEST :])
    assert torch.load(body, weights_only=True)["format"] == FORMAT


class Poisoned(Identity):
    """NaN for every signal whose first entry is above a threshold."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.where(x[:, :1] > 0.5, float("nan"), 1.0)


def test_non_finite_sample_is_named() -> None:
    problem = toy()
    problem = Problem(problem.prior, Likelihood(Poisoned(), problem.likelihood.y, 0.3))
    with pytest.raises(
        DivergenceError,
        match=r"the operator Poisoned returned NaN for sample \d of measurement \d at step \d+ of 20",
    ):
        driver.run(DPS(num_steps=20), problem, 4, progress=False)


def test_dropped_sample_leaves_the_others_alone() -> None:
    problem = Problem(toy().prior, Likelihood(Poisoned(), toy().likelihood.y, 0.3))
    result, alone = (
        driver.run(
            DPS(num_steps=20), problem, 4, progress=False, on_nonfinite="drop", batch_size=b
        )
        for b in (12, 1)
    )
    kept = result.finished
    assert 0 < int(kept.sum()) < 12
    assert torch.equal(kept, alone.finished)
    assert torch.allclose(result.samples[kept], alone.samples[kept], **ROUNDING)
    assert bool(result.samples[~kept].isnan().all())
    assert not bool(result.mean[kept.any(1)].isnan().any())
    dropped = [s for row in result.status for s in row if s != "ok"]
    assert all(s.startswith("dropped: ") for s in dropped)


def test_guidance_far_too_large_ends_with_a_diagnosis(
    photo: tuple[ig.Prior, GaussianBlur, torch.Tensor],
) -> None:
    prior, operator, y = photo
    solver = DPS(num_steps=30, guidance_scale=100.0, weight="official")
    with pytest.raises(
        DivergenceError, match=r"DPS diverged.*guidance_scale=100 is too large.*try 10"
    ):
        ig.solve(y, operator, prior, sigma_y=0.05, solver=solver, progress=False)


def test_nearly_exact_data_is_no_divergence() -> None:
    """Gradients of order 1 / sigma_y^2 make the moments of an optimiser huge; that is no runaway."""
    result = driver.run(REDDiff(num_steps=50), toy(sigma_y=1e-5), progress=False)
    assert bool(result.finished.all())


def test_black_box_is_refused_before_any_network_call(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = toy()
    monkeypatch.setattr(problem.prior, "denoise", None)
    operator = Identity()
    operator.differentiable = False
    problem = Problem(problem.prior, Likelihood(operator, problem.likelihood.y, 0.3))
    with pytest.raises(
        CompatibilityError, match=r"black box.*(solvers that would do|no solver at hand)"
    ):
        driver.run(DPS(), problem, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"on_nonfinite": "ignore"}, "choose one of: drop, raise"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        driver.run(DPS(num_steps=2), toy(), progress=False, **options)


def test_calls_are_counted() -> None:
    result = driver.run(DPS(num_steps=10), toy(rows=2), 3, progress=False)
    assert result.nfe == 10
    assert result.manifest["network_calls"] == 60
    assert result.manifest["vjp_calls"] == 60


def test_ctrl_c_without_a_checkpoint_returns_what_is_finished() -> None:
    def interrupt(report: driver.StepReport) -> None:
        if report.rows[0] == (1, 0):
            raise KeyboardInterrupt

    result = driver.run(
        DPS(num_steps=3), toy(), 1, batch_size=1, progress=False, callbacks=[interrupt]
    )
    assert result.status == [["ok"], ["interrupted"], ["interrupted"]]


def test_settings_of_a_run_are_in_its_manifest() -> None:
    manifest = driver.run(replace(DPS(), num_steps=3), toy(), progress=False).manifest
    assert manifest["settings"]["num_steps"] == 3
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0]
