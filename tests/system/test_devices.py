"""Short memory and several devices: the samples are those of one device with plenty."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import invguide as ig
from invguide import driver
from invguide.errors import DivergenceError, InputError
from invguide.numerics.linear import per_sample
from invguide.operators import GaussianBlur, SuperResolution
from invguide.prior import Prior
from invguide.result import Result
from invguide.reward import as_reward
from invguide.rng import Noise
from invguide.solver import EnsembleSolver, Solver
from invguide.solvers import DPS, HQS, SCG, EnKG
from invguide.system.devices import chunk_size, out_of_memory, resolve_devices

SHAPE = (1, 4, 5)


class Small(Prior):
    """A white prior whose network holds `limit` samples at most; from the call `after` on."""

    shape = SHAPE
    sigma_min, sigma_max, sigma_data = 0.01, 10.0, 1.0

    def __init__(self, limit: int | None = None, after: int = 0) -> None:
        super().__init__()
        self.limit, self.after, self.sizes = limit, after, []

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if self.limit is not None and len(x) > self.limit and len(self.sizes) > self.after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return x / (1 + per_sample(sigma, x) ** 2)


def run(prior: Prior, solver=None, num_samples: int | None = 5, **settings) -> Result:
    y = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
    likelihood = ig.Likelihood(GaussianBlur(sigma=1.0), y, 0.2)
    problem = ig.Problem(prior, likelihood)
    settings = {"device": "cpu", "dtype": torch.float64, "progress": False, **settings}
    return driver.run(solver or DPS(num_steps=4), problem, num_samples, **settings)


# Batches of another size are equal to rounding, not to the last bit: how a sum is vectorised depends on the shape. In
# float64 a step rounds a hundred times, each time by 1.1e-16 of at most 40, four sigma at the first level, and the
# steps contract: four of them make 2e-12. Other noise, or rows that know of each other, make 1e-3 and more.
ROUNDING = {"rtol": 0, "atol": 1e-11}


def same(a: Result, b: Result) -> bool:
    assert a.samples.dtype == torch.float64
    close = torch.allclose(a.samples, b.samples, **ROUNDING)
    return close and a.status == b.status and a.nfe == b.nfe


# ---- memory


@pytest.mark.parametrize(
    "solver", [DPS(num_steps=4), HQS(num_steps=4), EnKG(ensemble_size=5, num_steps=3)]
)
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_short_memory_halves_the_batch_and_changes_nothing(solver, limit: int) -> None:
    small = Small(limit)
    assert same(run(small, solver, batch_size="auto"), run(Small(), solver, batch_size="auto"))
    assert max(small.sizes) > limit  # it did run out
    fitting = [size for size in small.sizes if size <= limit]
    assert small.sizes[-len(fitting) :] == fitting  # and never again


def test_memory_that_runs_short_later() -> None:
    small = Small(limit=2, after=2)
    result = run(small, batch_size="auto")
    assert torch.allclose(result.samples, run(Small()).samples, **ROUNDING)
    assert result.status == [["ok"] * 5] * 2


def test_candidates_are_evaluated_in_parts() -> None:
    """One sample, whose eight candidates go through the network together."""
    reward = as_reward(lambda x: -x.square().flatten(1).sum(1))

    def search(prior: Prior) -> Result:
        problem = ig.Problem(prior, reward=reward)
        settings = {"device": "cpu", "dtype": torch.float64, "progress": False}
        return driver.run(SCG(num_candidates=8, num_steps=3), problem, 1, **settings)

    small = Small(limit=3)
    assert same(search(small), search(Small()))
    assert max(small.sizes) == 8


def test_a_batch_that_was_asked_for_is_not_changed() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        run(Small(limit=2), batch_size=4)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        run(Small(limit=0), batch_size="auto")  # not even one


def test_other_errors_are_not_taken_for_short_memory() -> None:
    class Broken(Small):
        def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
            self.sizes.append(len(x))
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    prior = Broken()
    with pytest.raises(RuntimeError, match="mat1"):
        run(prior, batch_size="auto")
    assert len(prior.sizes) == 1
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not out_of_memory(RuntimeError("mat1"))


# ---- several devices


@pytest.mark.parametrize("solver", [DPS(num_steps=4), EnKG(ensemble_size=5, num_steps=3)])
@pytest.mark.parametrize("count", [2, 3, 20])
@pytest.mark.parametrize("batch_size", ["auto", 1])
def test_the_number_of_devices_does_not_matter(solver, count: int, batch_size) -> None:
    one = run(Small(), solver, batch_size=batch_size)
    several = run(Small(), solver, batch_size=batch_size, device=["cpu"] * count)
    assert same(several, one)
    assert several.manifest["device"] == ", ".join(["cpu"] * count)


def test_devices_work_at_the_same_time_and_short_memory_is_theirs() -> None:
    # Broken unless two samples are in their first step at once.
    meeting = threading.Barrier(2, timeout=300)
    met: list[int] = []

    def meet(report: driver.StepReport) -> None:
        met.append(len(report.rows))

    class Meets(Small):
        def __deepcopy__(self, memo) -> Meets:
            return Meets(self.limit)

        def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
            if not self.sizes:
                meeting.wait()
            return super().denoise(x, sigma, **condition)

    result = run(Meets(limit=2), device=["cpu", "cpu"], callbacks=[meet])
    assert same(result, run(Small()))
    assert max(met) <= 2


def test_begun_on_two_devices_and_finished_on_any_number(tmp_path: Path) -> None:
    expected = run(Small())
    for count in (1, 2, 3):
        path = tmp_path / f"{count}.pt"

        def stop(report: driver.StepReport) -> None:
            if report.step == 2:
                raise KeyboardInterrupt

        settings = {"checkpoint": path, "checkpoint_every": 1, "batch_size": 2}
        begun = run(Small(), device=["cpu", "cpu"], callbacks=[stop], **settings)
        assert any("interrupted" in row for row in begun.status)
        finished = run(Small(), device=["cpu"] * count, **settings)
        assert same(finished, expected)


def test_a_failure_on_one_device_stops_the_others() -> None:
    class Fails(Small):
        def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
            return super().denoise(x, sigma) * (float("nan") if len(self.sizes) > 2 else 1)

    with pytest.raises(DivergenceError, match=r"the prior Fails returned NaN .* for sample \d"):
        run(Fails(), device=["cpu", "cpu"], batch_size=1)


def test_shared_random_numbers_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted mistake: noise from one generator, in the order in which devices happen to ask."""
    stream = torch.Generator().manual_seed(0)

    def draw(self, purpose: str = "", shape=None) -> Tensor:
        size = (len(self.rows), *(shape or self.shape))
        return torch.randn(size, generator=stream, dtype=self.dtype)

    monkeypatch.setattr(Noise, "__call__", draw)
    assert not same(run(Small(), batch_size=1), run(Small(), device=["cpu"] * 2, batch_size=1))


@pytest.mark.gpu
def test_every_gpu() -> None:
    result = run(Small(), device="cuda:all")
    assert torch.allclose(result.samples, run(Small()).samples, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: resolve_devices([]), "device is an empty list"),
        (lambda: resolve_devices(["cpu", "nowhere"]), "device 'nowhere' cannot be used here"),
        (lambda: chunk_size(0, SHAPE, torch.device("cpu")), "batch_size is 0"),
        (lambda: run(Small(), num_samples=2, device=["cpu"] * 2, batch_size="all"), "is 'all'"),
    ],
)
def test_errors(call, match: str) -> None:
    with pytest.raises(InputError, match=match):
        call()


def test_black_boxes_serve_one_device() -> None:
    box = ig.BlackBox(lambda x: x.sum(1), workers=1)
    y = torch.zeros(1, 4)
    prior = ig.priors.Gaussian(torch.zeros(2, 4), torch.eye(8))
    with pytest.raises(InputError, match="a black box has workers of its own"):
        ig.solve(
            y, box, prior, sigma_y=0.1, solver=EnKG(ensemble_size=4), device=["cpu"] * 2, progress=False
        )  # fmt: skip


# ---- another kind of device


# Of four members that weigh each other, rounding decides who has descendants.
CHAOTIC = {"EnsembleTwisted"}
# One network call, or none: of tests/solvers/test_policy.py and test_anscombe.py.
CHAOTIC |= {"PosteriorMean", "ExactPosterior", "Anscombe"}
COMPARED = {n for n, kind in Solver.registry.items() if kind.requires.target != "reward"} - CHAOTIC


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(COMPARED))
def test_samples_do_not_depend_on_the_device(name: str, device: torch.device) -> None:
    """The embedded network in single precision, one sample at a time; its arithmetic is not that of the batch.

    Rounding of 1e-7 grows from step to step, and cuDNN may use TF32: 1e-3 of a picture in [0, 1] is far less than
    another noise would make, and more than a few steps lose.
    """
    solver = ig.api.make_solver(name, num_steps=3)
    if isinstance(solver, EnsembleSolver):
        solver = replace(solver, ensemble_size=4)
    operator = SuperResolution(factor=8)  # few numbers: four members would not survive many
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = operator(picture) + 0.05
    samples = [
        ig.solve(
            y, operator, "natural-tiny", sigma_y=0.1, solver=solver, progress=False, **where
        ).samples
        for where in ({"device": "cpu"}, {"device": str(device), "batch_size": 1})
    ]
    assert torch.allclose(*samples, atol=1e-3)
