"""Plans against the runs that they are made for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import invguide as ig
from invguide import driver, planning
from invguide.cli.terminal import app
from invguide.errors import CompatibilityError, InputError
from invguide.numerics.linear import per_sample
from invguide.operators import GaussianBlur
from invguide.planning import plan_run
from invguide.prior import Prior
from invguide.priors import Tiled
from invguide.priors.wrappers import tiled
from invguide.problem.data_size import measuring_calls
from invguide.restoration.demo import PHOTO
from invguide.reward import as_reward
from invguide.solvers import DPS, HQS, SCG, EnKG
from invguide.system.memory import peak_memory

SHAPE = (1, 4, 5)


class Small(Prior):
    shape = SHAPE
    sigma_min, sigma_max, sigma_data = 0.01, 10.0, 0.5

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        return x / (1 + per_sample(sigma, x) ** 2)


def problem(prior: Prior | None = None) -> ig.Problem:
    y = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    return ig.Problem(prior or Small(), ig.Likelihood(GaussianBlur(sigma=1.0), y, 0.2))


@pytest.mark.parametrize("batch_size", ["auto", 2])
@pytest.mark.parametrize("solver", [DPS(num_steps=4), HQS(num_steps=3), HQS(num_steps=1)])
def test_calls_are_those_of_the_run(solver, batch_size) -> None:
    settings = {"device": "cpu", "batch_size": batch_size}
    planned = plan_run(solver, problem(), 5, **settings)
    manifest = driver.run(solver, problem(), 5, progress=False, **settings).manifest
    assert planned.samples == 10
    # Where samples look odd, the driver measures what clean ones are like; that cannot be planned.
    odd = measuring_calls(problem().shape) if manifest["warnings"] else 0
    assert planned.network_calls in (manifest["network_calls"], manifest["network_calls"] - odd)
    assert planned.vjp_calls == manifest["vjp_calls"]
    # The driver evaluates every sample once more at the end, and a blank signal for each batch and measurement: of
    # five batches of two, one belongs to both.
    final = 10 + (2 if batch_size == "auto" else 6)
    assert planned.forward_calls == manifest["forward_calls"] - final


def test_calls_of_steps_that_differ() -> None:
    """EnKG looks ahead less and less far, and calls the operator in a window of levels only."""
    solver = EnKG(num_steps=40, ensemble_size=5)
    planned = plan_run(solver, problem(), device="cpu")
    manifest = driver.run(solver, problem(), device="cpu", progress=False).manifest
    assert abs(planned.network_calls / manifest["network_calls"] - 1) < 0.15
    assert planned.forward_calls > 0


def test_calls_of_a_reward_with_candidates() -> None:
    target = ig.Problem(Small(), reward=as_reward(lambda x: x.flatten(1).sum(1)))
    solver = SCG(num_candidates=4, num_steps=5)
    planned = plan_run(solver, target, 3, device="cpu")
    manifest = driver.run(solver, target, 3, device="cpu", progress=False).manifest
    assert planned.network_calls == manifest["network_calls"]


def test_memory_is_that_of_the_run() -> None:
    prior, operator = ig.load_prior("natural-tiny"), GaussianBlur(sigma=1.0)
    y = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    settings = {"sigma_y": 0.1, "solver": DPS(num_steps=3), "device": "cpu"}
    planned = ig.plan(y, operator, prior, **settings)
    weights = sum(4 * p.numel() for p in (*prior.parameters(), *prior.buffers()))
    actual = peak_memory(
        lambda: ig.solve(y, operator, prior, progress=False, **settings), torch.device("cpu")
    )
    # The run also holds its result and the measurement.
    assert 0.9 * actual < planned.memory - weights < 1.05 * actual
    half = ig.plan(y[..., :32], operator, prior, **settings)
    assert half.memory - weights < 0.6 * (planned.memory - weights)


@pytest.mark.parametrize(("devices", "rounds"), [(["cpu"], 5), (["cpu"] * 2, 3), (["cpu"] * 5, 1)])
def test_time_is_that_of_the_rounds(
    devices: list[str], rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # init takes 2 seconds; a step of the first half 3, of the second 4, the last 1
    clock = iter([10.0, 12.0, 20.0, 23.0, 30.0, 34.0, 40.0, 41.0])
    monkeypatch.setattr(planning, "now", lambda _: next(clock))
    planned = plan_run(DPS(num_steps=4), problem(), 5, batch_size=2, device=devices)
    assert planned.seconds == rounds * (2 + 1.5 * 3 + 1.5 * 4 + 1)


def test_a_few_tiles_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seen = [0.0], []

    class Slow(
        Small
    ):  # three seconds a call, whatever it is called for, and three more for its gradient
        shape = (1, None, None)

        def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
            clock[0] += 3.0
            seen.append(tuple(x.shape))
            if x.requires_grad:
                x.register_hook(lambda g: clock.__setitem__(0, clock[0] + 3.0))
            return super().denoise(x, sigma)

    for module in (planning, tiled):
        monkeypatch.setattr(module, "now", lambda _: clock[0])
    prior = Tiled(Slow(), tile=8, overlap=2)
    y = torch.randn(1, 1, 62, 32, generator=torch.Generator().manual_seed(0))
    measured = ig.Problem(prior, ig.Likelihood(GaussianBlur(sigma=1.0), y, 0.2))
    tiles = 10 * 5
    for solver, per_step in ((HQS(num_steps=6), 3), (DPS(num_steps=6), 3 + 3 + 3)):
        seen.clear()
        planned = plan_run(solver, measured, 1, device="cpu")
        assert len(seen) <= 4 * 4 * 2  # of four steps, each a few tiles, forwards and backwards
        assert planned.seconds == pytest.approx(6 * tiles * per_step)
        assert set(seen) == {(1, 1, 8, 8)}
    # Afterwards all of them are gone through again.
    seen.clear()
    prior.denoise(y, 0.5)
    assert len(seen) == tiles


def test_short_memory_is_met_as_by_the_driver() -> None:
    class Short(Small):
        def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
            if len(x) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().denoise(x, sigma, **condition)

    planned = plan_run(DPS(num_steps=4), problem(Short()), 5, device="cpu")
    assert (planned.batch_size, planned.network_calls) == (2, 40)
    with pytest.raises(torch.OutOfMemoryError):
        plan_run(DPS(num_steps=4), problem(Short()), 5, batch_size=4, device="cpu")


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan_run(DPS(num_steps=4), problem(), device="cpu").fits
    monkeypatch.setattr(planning, "_free", lambda *_: 100)
    planned = plan_run(DPS(num_steps=4), problem(), device="cpu")
    assert not planned.fits
    assert "too large: use priors.Tiled" in str(planned)


def test_mistakes_are_found_as_by_solve() -> None:
    y = torch.zeros(1, 1, 4, 5)
    with pytest.raises(InputError, match="the noise level is unknown"):
        ig.plan(y, GaussianBlur(sigma=1.0), Small())
    with pytest.raises(CompatibilityError, match="needs a measurement"):
        plan_run(HQS(), ig.Problem(Small(), reward=as_reward(lambda x: x.flatten(1).sum(1))))


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cat.png"
    Image.open(PHOTO).resize((40, 32)).save(path)
    arguments = [
        "plan",
        str(path),
        "--task",
        "deblur",
        "--prior",
        "natural-tiny",
        "--samples",
        "2",
    ]
    result = CliRunner().invoke(app, [*arguments, "--steps", "7", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "TweedieMatheron, 7 steps, 2 samples of 3 x 32 x 40" in result.output
    calls = re.search(r"calls     (\d+) of the network, (\d+) of its gradient", result.output)
    assert calls is not None
    # At each level D and the draw's product, and up to three products, of one call and one gradient each.
    assert calls[1] == calls[2]
    assert 2 * 7 * 2 <= int(calls[1]) <= 2 * 7 * 4
    monkeypatch.setattr(planning, "_free", lambda *_: 100)
    assert CliRunner().invoke(app, arguments).exit_code == 1
    assert CliRunner().invoke(app, ["plan", "none.png", "--task", "deblur"]).exit_code == 2


def test_durations_and_sizes() -> None:
    assert [planning._duration(t) for t in (0.31, 45.2, 600, 9000)] == [
        "0.3 s",
        "45 s",
        "10 min",
        "2 h 30 min",
    ]
    assert [planning._size(n) for n in (3_400_000, 2_500_000_000)] == ["3 MB", "2.5 GB"]
