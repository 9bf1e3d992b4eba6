"""MotionGuidance and its reward: loops, scipy and autograd as oracles; what moves arrives, what must stay stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor

import invguide as ig
from invguide import driver
from invguide.errors import CompatibilityError, InputError, ShapeError
from invguide.problem.problem import Problem
from invguide.rewards import RAFT, Motion, TotalVariation, motion
from invguide.rewards.motion import visible_pixels, warp_by
from invguide.solvers import MotionGuidance, UniversalGuidance
from special_rewards import MASK, SHAPE, SIZE, Spots, blob, centre, centre_flow, shift

QUICK = MotionGuidance(25)


def guided(reward: ig.Reward, solver: Any = QUICK, count: int = 6, **run: Any) -> ig.Result:
    return ig.guide(Spots(), reward, solver=solver, num_samples=count, progress=False, **run)


# ---- moving


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "settings"),
    [
        (None, {}),
        (centre_flow, {}),
        (centre_flow, {"warp": "estimated", "colour_weight": 10.0}),
        (centre_flow, {"colour_weight": 0.0, "flow_weight": 10.0}),
    ],
    ids=["colours", "both", "estimated warp", "flow alone"],
)
@pytest.mark.parametrize("weight", ["adaptive", "official"])
def test_a_spot_moves_along_the_flow(estimator: Any, settings: dict[str, Any], weight: str):
    """Places are a pixel apart, so that a third of one names the right place."""
    reward = Motion(blob(4, 4), shift(4, 2), estimator, **settings)
    result = guided(reward, replace(QUICK, weight=weight))
    found = centre(result.samples[0])
    torch.testing.assert_close(
        found, torch.tensor([[8.0, 6.0]]).double().expand(6, 2), atol=0.33, rtol=0
    )


def test_without_the_reward_it_does_not():
    found = centre(guided(0 * Motion(blob(4, 4), shift(4, 2))).samples[0])
    assert ((found - torch.tensor([8.0, 6.0])).norm(dim=1) > 1).sum() >= 4


@pytest.mark.parametrize("fault", ["direction", "axes"])
def test_planted_wrong_warps_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch):
    def wrong(x: Tensor, flow: Tensor) -> Tensor:
        return warp_by(x, -flow if fault == "direction" else flow.flip(1))

    monkeypatch.setattr(motion, "warp_by", wrong)
    found = centre(guided(Motion(blob(4, 4), shift(4, 2))).samples[0])
    assert ((found - torch.tensor([8.0, 6.0])).norm(dim=1) > 1).sum() >= 4


# ---- staying


def masked() -> Motion:
    return Motion(blob(8, 6) + 0.1, shift(0, 1), edit_mask=MASK)


@pytest.mark.parametrize("weight", ["adaptive", "official"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_outside_the_mask_the_source_is_kept(weight: str, eta: float):
    """To the digits of the change of units."""
    result = guided(masked(), MotionGuidance(8, weight=weight, eta=eta))
    difference = (result.samples[0] - masked().source.double()).abs().amax((0, 1))
    assert difference[~MASK].max() < 1e-12
    assert difference[MASK].min() > 1e-6


class Forgetful(MotionGuidance):
    """Writes the source into the state of the first step only."""

    def step(self, problem: Problem, state: Any, k: int, noise: Any) -> Any:
        def edit(*arguments: Any) -> Any:
            source, mask = MotionGuidance._edit(self, *arguments)
            return source, torch.ones_like(mask)

        object.__setattr__(self, "_edit", edit)
        return super().step(problem, state, k, noise)


def test_a_planted_solver_that_forgets_the_mask_is_caught():
    result = guided(masked(), Forgetful(8))
    difference = (result.samples[0] - masked().source.double()).abs().amax((0, 1))
    assert difference[~MASK].max() > 1e-3


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_outside_the_mask_the_state_is_the_source_at_each_level(eta: float):
    """Noise of unit spread at every step: one standard error of 64 x 81 numbers is 1 %."""
    solver, reward, stds = MotionGuidance(8, eta=eta), masked(), []
    outside = ~MASK

    class Spy(MotionGuidance):
        def step(self, problem: Problem, state: Any, k: int, noise: Any) -> Any:
            a, _ = problem.levels(self.schedule, self.num_steps, k)
            n = (state.x - reward.source)[:, :, outside] / a
            stds.append(n.std().item())
            assert abs(n.mean().item()) < 0.05
            return super().step(problem, state, k, noise)

    guided(reward, Spy(8, eta=eta), count=64, batch_size=64)
    assert len(stds) == solver.num_steps
    assert stds == pytest.approx([1.0] * 8, abs=0.04)


def test_a_soft_mask_blends():
    half = Motion(blob(4, 4), shift(3, 0), edit_mask=torch.full((SIZE, SIZE), 0.5))
    found = guided(half).samples[0]
    assert ((found - half.source).abs() <= 0.75).all()  # half of the source is always there
    assert (found[:, 0, 4, 4] > 0.4).all()


# ---- the solver


def test_without_a_mask_it_is_universal_guidance():
    """To the last bit, from a blank source."""
    reward = Motion(torch.zeros(SHAPE).double(), shift(1, 0), lambda a, b: 3 * shift(1, 0) * b)
    ours = guided(reward, MotionGuidance(9))
    theirs = guided(reward, UniversalGuidance(9, guidance_scale=300.0))
    assert torch.equal(ours.samples, theirs.samples)
    assert ours.nfe == theirs.nfe == 18


def test_the_official_step_is_clipped_per_sample():
    """A reward of any steepness moves D by clip times the noise's own length, and no farther."""
    reward = Motion(blob(4, 4), shift(4, 2), colour_weight=1e9)
    problem = Problem(Spots(), reward=reward)
    solver = MotionGuidance(weight="official")
    x = blob(5, 5) + 0.5 * torch.randn(4, *SHAPE, dtype=torch.float64)
    guidance = problem.guide(x, 0.5)
    moved = solver._strength(problem, guidance, 0.5, 0.4) * guidance.gradient.flatten(1).norm(
        dim=1
    )
    torch.testing.assert_close(moved, torch.full_like(moved, 1.5625 * 0.5 * SIZE))
    gentle = replace(solver, guidance_scale=1e-12)._strength(problem, guidance, 0.5, 0.4)
    torch.testing.assert_close(gentle, torch.full_like(gentle, 1e-12 * 0.25))


def test_the_embedded_prior_moves_a_disk():
    """On the small prior of photographs: the red is where the disk should be, and less where it was."""
    source = torch.full((3, 32, 32), 0.5)
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    old, new = ((columns - c) ** 2 + (rows - 16) ** 2 < 30 for c in (10, 21))
    source[:, old] = torch.tensor([0.9, 0.2, 0.1])[:, None]
    reward = Motion(source, torch.stack([11.0 * old, 0.0 * old]), edit_mask=old | new)
    prior = ig.load_prior("natural-tiny")
    result = ig.guide(prior, reward, solver=MotionGuidance(15), shape=source.shape, progress=False)
    x = result.samples[0, 0]
    redness = x[0] - x[1]  # 0.7 in the disk
    assert redness[new].mean() > 0.5
    assert redness[old].mean() < 0.4  # free to be anything


# ---- the reward


def random_case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.rand(3, 3, 7, 6, dtype=dtype),
        torch.rand(3, 7, 6, dtype=dtype),
        3 * torch.randn(2, 7, 6, dtype=dtype),
    )


def test_the_warp_is_scipys():
    x, _, flow = random_case()
    rows, columns = np.meshgrid(np.arange(7), np.arange(6), indexing="ij")
    where = [rows + flow[1].numpy(), columns + flow[0].numpy()]
    expected = [
        [map_coordinates(c, where, order=1, mode="nearest") for c in row] for row in x.numpy()
    ]
    np.testing.assert_allclose(warp_by(x, flow.expand(3, -1, -1, -1)), expected, atol=1e-12)


def visible_by_loops(flow: np.ndarray) -> np.ndarray:
    height, width = flow.shape[1:]
    pixels = [(r, c) for r in range(height) for c in range(width)]
    there = {(r, c): (r + flow[1, r, c], c + flow[0, r, c]) for r, c in pixels}
    moving = [p for p in pixels if flow[:, p[0], p[1]].any()]
    result = np.zeros((height, width), dtype=bool)
    for r, c in pixels:
        i, j = there[r, c]
        inside = 0 <= i <= height - 1 and 0 <= j <= width - 1
        covered = any(abs(there[q][0] - r) < 1 and abs(there[q][1] - c) < 1 for q in moving)
        result[r, c] = inside and ((r, c) in moving or not covered)
    return result


@pytest.mark.parametrize("kind", ["random", "whole", "small"])
def test_visible_pixels_by_loops(kind: str):
    flow = random_case()[2]
    flow = {"random": flow, "whole": flow.round(), "small": 0.2 * flow}[kind]
    flow = flow * (torch.rand(7, 6) > 0.5)  # about half is still
    assert np.array_equal(visible_pixels(flow).numpy(), visible_by_loops(flow.numpy()))


def test_what_is_visible():
    flow = torch.zeros(2, 9, 9)
    assert visible_pixels(flow).all()
    flow[0, 3:6, 1:4] = 4  # a square moves four to the right, over what lies still there
    hidden = torch.zeros(9, 9, dtype=torch.bool)
    hidden[3:6, 5:8] = True
    assert torch.equal(~visible_pixels(flow), hidden)
    assert torch.equal(visible_pixels(shift(3, 0)).all(0), torch.arange(SIZE) < SIZE - 3)


@pytest.mark.parametrize("warp", ["target", "estimated"])
def test_the_loss_by_hand(warp: str):
    x, source, flow = random_case()
    estimate = 2 * torch.randn(3, 2, 7, 6, dtype=torch.float64)
    reward = Motion(source, flow, lambda a, b: [None, estimate], flow_weight=2, warp=warp)
    expected = []
    visible = visible_pixels(flow).numpy()
    for i in range(3):
        by = (flow if warp == "target" else estimate[i])[None]
        difference = (warp_by(x[i : i + 1], by)[0] - source).abs().mean(0).numpy()
        flows = (estimate[i] - flow).abs().mean().item()
        expected.append(-2 * flows - 100 * difference[visible].mean())
    np.testing.assert_allclose(reward(x), expected)


def bend(first: Tensor, second: Tensor) -> Tensor:
    """A smooth flow that depends on both pictures."""
    return torch.sin(second[:, :2] * 3 - first[:, 1:]) * 1.7


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"estimator": bend}, {"estimator": bend, "warp": "estimated"}]
)
def test_the_gradient_and_the_check(settings: dict[str, Any]):
    x, source, flow = random_case()
    reward = Motion(source, flow, **settings)
    assert torch.autograd.gradcheck(reward, (x.requires_grad_(),))
    certificate = reward.check(x=x, quiet=True)
    assert certificate.ok, str(certificate)
    assert certificate["differentiable"].verdict == "ok"


def test_a_shifted_picture_scores_best():
    source = blob(5, 5)
    reward = Motion(source, shift(2, 1), centre_flow)
    assert reward(blob(7, 6)[None]).item() == pytest.approx(0, abs=0.1)
    assert reward(source[None]).item() < -5
    assert " at 0x" not in repr(reward)
    assert "estimator=centre_flow" in repr(reward)


# ---- torchvision's network


def test_raft_on_pictures_of_any_size():
    """With random weights, which are enough for units, sizes and slopes."""
    raft = RAFT(weights=None, num_updates=1).eval()
    first, second = torch.rand(2, 3, 40, 50), torch.rand(2, 3, 40, 50)
    flow = raft(first, second)
    assert flow.shape == (2, 2, 40, 50)
    torch.testing.assert_close(raft(first[:1], second[:1]), flow[:1], rtol=1e-3, atol=1e-4)
    reward = Motion(first[0], torch.zeros(2, 40, 50), raft, colour_weight=0.0)
    second.requires_grad_()
    (slope,) = torch.autograd.grad(reward(second).sum(), second)
    assert (slope.abs().amax((1, 2, 3)) > 0).all()
    raft.net.forward = lambda a, b, num_flow_updates: [torch.ones(2, 2, *a.shape[2:])]
    found = raft(first, second)  # one pixel of 128 x 128 is so many of 50 x 40
    assert found[0, :, 3, 3].tolist() == pytest.approx([50 / 128, 40 / 128])
    found = raft(torch.rand(2, 3, 130, 200), torch.rand(2, 3, 130, 200))
    assert found[0, :, 3, 3].tolist() == pytest.approx([1.0, 130 / 136])


# ---- mistakes

PICTURE, FLOW = torch.rand(3, 6, 5), torch.zeros(2, 6, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Motion(PICTURE[None], FLOW), r"drop the batch axis with reference\[0\]"),
        (lambda: Motion(PICTURE[:, :1], FLOW), "the source is 1 x 5; expected at least 2 x 2"),
        (
            lambda: Motion(PICTURE, FLOW[:, :5]),
            r"flow has shape \(2, 5, 5\); expected \(2, 6, 5\)",
        ),
        (lambda: Motion(PICTURE, FLOW + torch.nan), "the flow has NaN"),
        (lambda: Motion(PICTURE, FLOW, edit_mask=torch.ones(5, 6)), r"mask has shape \(5, 6\)"),
        (lambda: Motion(PICTURE, FLOW, edit_mask=2 * torch.ones(6, 5)), "goes beyond"),
        (lambda: Motion(PICTURE, FLOW, flow_weight=-1), "flow_weight is -1"),
        (
            lambda: Motion(PICTURE, FLOW, warp="estimated"),
            "warp is 'estimated'; expected 'target'",
        ),
        (lambda: Motion(PICTURE, FLOW, RAFT), "estimator is the class RAFT; pass an instance"),
        (
            lambda: Motion(PICTURE, FLOW, lambda a, b: b)(PICTURE[None]),
            r"returned \(1, 3, 6, 5\); ex",
        ),
        (lambda: Motion(PICTURE, FLOW)(torch.rand(1, 3, 6, 6)), "expected that of the source"),
        (lambda: Motion(PICTURE, FLOW)(torch.rand(1, 1, 6, 5)), "1 channels; expected 3"),
        (lambda: RAFT("tiny"), "size is 'tiny'; choose one of"),
        (lambda: RAFT(num_updates=0), "num_updates is 0"),
        (lambda: RAFT(weights=None)(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8)), "colour pic"),
        (lambda: MotionGuidance(weight="adaptve"), "did you mean 'adaptive'"),
        (lambda: MotionGuidance(guidance_scale=-1.0), "guidance_scale is -1"),
        (lambda: MotionGuidance(clip=0.0), "clip is 0"),
        (lambda: MotionGuidance(num_recurrences=0), "num_recurrences is 0"),
    ],
)
def test_mistakes_are_named(make: Callable[[], Any], message: str):
    with pytest.raises(InputError, match=message):
        make()


def test_problems_that_are_no_edit_are_refused():
    with pytest.raises(
        CompatibilityError, match=r"needs a reward of the kind EditReward, and Total.*do: .*DPS"
    ):
        guided(TotalVariation())
    with pytest.raises(CompatibilityError, match=r"edits one picture, and .* names 2; leave one"):
        guided(Motion(blob(4, 4), shift(1, 0)) + Motion(blob(5, 4), shift(1, 0)))
    other = Problem(Spots(), reward=Motion(torch.rand(1, 4, 4), torch.zeros(2, 4, 4)))
    with pytest.raises(ShapeError, match=r"pass shape=\(1, 4, 4\)"):
        driver.run(MotionGuidance(3), other, progress=False)
