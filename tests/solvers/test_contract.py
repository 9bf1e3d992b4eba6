"""Every public solver keeps the promises of `invguide.testing.check_solver`: one table, a planted mistake for each.

A row is a solver with few steps; a second row of a solver is another variant of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import invguide as ig
import invguide.solvers
from invguide.arguments import checks
from invguide.errors import CompatibilityError, ContractError, InputError
from invguide.feature_reward import FeatureReward
from invguide.likelihood import Likelihood
from invguide.operators import Identity
from invguide.policy import choose
from invguide.priors import Gaussian, GaussianMixture
from invguide.problem import Problem
from invguide.reward import as_reward
from invguide.rewards import ClassLogProb, Motion, TotalVariation
from invguide.rng import Noise
from invguide.solver import Solver
from invguide.solvers import (
    DOODL,
    DPG,
    DPS,
    EKI,
    HQS,
    SCG,
    Anscombe,
    DFlow,
    DiffPIR,
    DPSZerothOrder,
    Dreamguider,
    ECMGuidance,
    EluCD,
    EnKG,
    EnsembleTwisted,
    ExactPosterior,
    FeatureGuidance,
    FeynmanKac,
    MotionGuidance,
    PosteriorMean,
    REDDiff,
    SymplecticAdjoint,
    TweedieMatheron,
    Unconditional,
    UniversalGuidance,
)
from invguide.testing import check_solver
from special_rewards import (
    MASK,
    MEAN,
    MODULES,
    SPOTS,
    VARIANCE,
    Spots,
    blob,
    centre_flow,
    distance,
    gaussian,
    network,
    shift,
)

CONTROL = "unconditional control"


# ---- problems of rewards


def clusters() -> GaussianMixture:
    return GaussianMixture([[-1.0, 0.0], [1.0, 1.0]], 0.1 * torch.eye(2).double())


def waves() -> Problem:
    return Problem(clusters(), reward=as_reward(lambda x: x.sin().sum(1)))


def hills() -> Problem:
    reward = as_reward(lambda x: x.sin().sum(1) - x.square().sum(1) ** 2)
    return Problem(clusters(), reward=reward)


class Classes(nn.Module):
    """The exact classifier of three Gaussians of variance 0.5, up to what all logits share."""

    def forward(self, x: Tensor) -> Tensor:
        means = torch.tensor([[0.0, 1.0], [1.0, -1.0], [-1.0, 0.0]], dtype=torch.float64)
        return -(x[:, None] - means).square().sum(2)


def classes() -> Problem:
    return Problem(clusters(), reward=ClassLogProb(Classes(), 1, marginal=0.5))


def picture() -> Problem:
    prior = Gaussian(torch.zeros(1, 4, 4), torch.eye(16), scale=0.5, shift=0.5)
    weight = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(4, 4)
    reward = as_reward(lambda x: (weight * x).sum((1, 2, 3)) - x.square().sum((1, 2, 3)))
    return Problem(prior, reward=reward)


def measured() -> Problem:
    prior = Gaussian(torch.zeros(3), torch.diag(torch.tensor([1.0, 0.5, 0.3])))
    y = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
    return Problem(prior, Likelihood(Identity(), y, 0.2))


def far_apart() -> Problem:
    """Two measurements between two modes."""
    y = torch.tensor([[0.3, 0.8], [-0.5, 0.1]], dtype=torch.float64)
    return Problem(clusters(), Likelihood(Identity(), y, torch.full_like(y, 0.3)))


def moved() -> Problem:
    reward = Motion(blob(4, 4), shift(4, 2), centre_flow, edit_mask=MASK) + 0.1 * TotalVariation()
    return Problem(Spots(), reward=reward)


def unmasked() -> Problem:
    return Problem(Spots(), reward=Motion(blob(4, 4), shift(4, 2), centre_flow))


def head() -> Problem:
    prior, reward = gaussian()
    return Problem(prior.double(), reward=reward)


def features() -> Problem:
    prior = network()
    return Problem(prior, reward=FeatureReward(prior, MODULES, distance) + 0.1 * TotalVariation())


# ---- the table


class Row(NamedTuple):
    solver: Solver[Any]
    problem: Callable[[], Problem] | None = None
    exceptions: dict[str, str] = {}
    control: dict[str, Any] = {}
    prior_draws: Callable[[], Tensor] | None = None


def no_control(reason: str) -> dict[str, str]:
    return {CONTROL: reason}


FOLLOWS = "its steps have a length of their own: it follows any slope, however weak the target is"
KEEPS = "outside of the mask the picture stays as it is"
VIEWS = "views are of pictures under a reward"
ONE_SIGMA = "this weight is defined for Gaussian noise of one sigma_y, and the others for more"
UNKNOWN = "the law of a random network is not known"
OFF = {"guidance_scale": 0.0}


def spots() -> Tensor:
    return SPOTS.sample(4000, seed=1).reshape(-1, *Spots.shape)


def normals() -> Tensor:
    return MEAN + VARIANCE**0.5 * torch.randn(20000, 2, dtype=torch.float64)


TABLE = [
    Row(DOODL(8, 4), far_apart, no_control(FOLLOWS), {"num_steps": 20}),
    Row(DPG(6, num_candidates=8), measured),
    Row(DPG(6, num_candidates=8, weight="official"), measured, control=OFF),
    Row(DPS(6)),
    Row(DPS(6, weight="likelihood", eta=0.0)),
    Row(DPS(6, weight="official"), None, {"refusals": ONE_SIGMA}, OFF),
    Row(EKI(6, 12, prior_steps=8), control={"prior_steps": 100}),
    Row(EKI(6, 12, prior_steps=8, localised=True), control={"prior_steps": 100}),
    Row(HQS(6)),
    Row(SCG(6, num_candidates=3), waves, no_control("greedy takes the best of any difference")),
    Row(SCG(6, num_candidates=3, num_draws=2, select="softmax"), waves),
    Row(Anscombe(3)),
    Row(DFlow(8, 4), far_apart),
    Row(DFlow(8, 4, randomised=True), far_apart, {"refusals": "it perturbs y by Gaussian noise"}),
    Row(DPSZerothOrder(6, num_candidates=8), measured),
    Row(DPSZerothOrder(6, num_candidates=8, difference="central"), measured),
    Row(DiffPIR(6), None, no_control("it takes x0 given x as a point: the spread is too small")),
    Row(Dreamguider(6, num_augmentations=2), picture, control=OFF),
    Row(
        Dreamguider(6, augmentations=("flip", "crop"), num_augmentations=2),
        picture,
        {"refusals": VIEWS, "conditions": VIEWS, **no_control(f"{VIEWS}, and that of the control is none")},
    ),
    Row(ECMGuidance(6)),
    Row(ECMGuidance(8, 0.1), hills),
    Row(ECMGuidance(8, 0.1, weight="official"), hills, control=OFF),
    Row(EluCD(6)),
    Row(EluCD(8, 0.1), classes),
    Row(EluCD(8, 0.1, weight="ddpm"), classes),
    Row(EluCD(8, 0.1, weight="edm"), classes, control=OFF),
    Row(EnKG(6, 12)),
    Row(EnKG(6, 12, correction="normalized"), control=OFF),
    Row(EnsembleTwisted(6, 12), control={"ensemble_size": 300}),
    Row(ExactPosterior(3), control={"num_steps": 1}),
    Row(ExactPosterior(3, draw=False)),
    Row(FeatureGuidance(6), head, control=OFF, prior_draws=normals),
    Row(FeatureGuidance(6, weight="bounded", eta=0.5), features, no_control(UNKNOWN)),
    Row(FeatureGuidance(6, weight="official"), features, no_control(UNKNOWN)),
    Row(FeynmanKac(6, 12)),
    Row(FeynmanKac(6, 12, potential="denoised")),
    Row(MotionGuidance(6), unmasked, control={**OFF, "num_steps": 40}, prior_draws=spots),
    Row(MotionGuidance(6, eta=0.5), moved, no_control(KEEPS)),
    Row(MotionGuidance(6, weight="official", eta=0.5), moved, no_control(KEEPS)),
    Row(PosteriorMean(3)),
    Row(REDDiff(6)),
    Row(REDDiff(6, weight="official"), None, {"refusals": ONE_SIGMA}),
    Row(SymplecticAdjoint(6)),
    *(
        Row(SymplecticAdjoint(8, 3, weight=w, num_recurrences=2, guidance_scale=0.2), waves, control=OFF)
        for w in ("adaptive", "likelihood", "normalised")
    ),
    Row(TweedieMatheron(6)),
    Row(Unconditional(6)),
    Row(Unconditional(6, eta=0.0)),
    Row(UniversalGuidance(6)),
    Row(UniversalGuidance(8, num_backward_steps=3), hills, no_control(FOLLOWS), {"num_steps": 20}),
    Row(UniversalGuidance(8, num_backward_steps=3, optimiser="adam"), hills, control=OFF),
]  # fmt: skip


def title(row: Row) -> str:
    usual = type(row.solver)().settings
    mine = {n: v for n, v in row.solver.settings.items() if usual[n] != v}
    return "-".join([type(row.solver).__name__, *(f"{n}={v}" for n, v in mine.items())])


@pytest.mark.slow
@pytest.mark.parametrize("row", TABLE, ids=title)
def test_solver_keeps_its_promises(row: Row):
    check_solver(
        row.solver,
        row.problem and row.problem(),
        exceptions=row.exceptions,
        control=row.control,
        prior_draws=row.prior_draws and row.prior_draws(),
    )


def test_every_public_solver_is_in_the_table():
    assert {type(row.solver).__name__ for row in TABLE} == set(ig.solvers.__all__)


# ---- planted mistakes, in DPS


def planted(**body: Any) -> Solver[Any]:
    """DPS with other methods or attributes."""
    return type("Planted", (DPS,), {"__doc__": DPS.__doc__, **body})(6)


def before(change: Callable[[Any, Problem, Any, int, Noise], tuple[Any, Noise]]) -> Any:
    """A step that begins with another state and other noise."""

    def step(self: Any, problem: Problem, state: Any, k: int, noise: Noise) -> Any:
        state, noise = change(self, problem, state, k, noise)
        return DPS.step(self, problem, state, k, noise)

    return step


def global_noise(_: Any, problem: Problem, state: Any, k: int, noise: Noise) -> Any:
    return state._replace(x=state.x + 1e-6 * torch.randn_like(state.x)), noise


def one_seed(_: Any, problem: Problem, state: Any, k: int, noise: Noise) -> Any:
    return state, replace(noise, seed=0)


def one_row(_: Any, problem: Problem, state: Any, k: int, noise: Noise) -> Any:
    return state, replace(noise, rows=((0, 0),) * len(noise.rows))


def batch_mean(_: Any, problem: Problem, state: Any, k: int, noise: Noise) -> Any:
    return state._replace(x=state.x + 1e-9 * state.x.mean()), noise


def neighbours(_: Any, problem: Problem, state: Any, k: int, noise: Noise) -> Any:
    return state._replace(x=state.x + 1e-9 * state.x.roll(1, 0)), noise


def place(_: Any, problem: Problem, state: Any, k: int, noise: Noise) -> Any:
    """Depends on where in the batch a row is."""
    return state._replace(x=state.x + 1e-9 * torch.arange(len(state.x))[:, None]), noise


def changed_state(_: Any, problem: Problem, state: Any, k: int, noise: Noise) -> Any:
    state.x.mul_(1.001)
    return state, noise


def changed_y(_: Any, problem: Problem, state: Any, k: int, noise: Noise) -> Any:
    problem.y.mul_(1.001)
    return state, noise


def changed_prior(_: Any, problem: Problem, state: Any, k: int, noise: Noise) -> Any:
    next(problem.prior.buffers()).mul_(1.001)
    return state, noise


def changed_condition(_: Any, problem: Problem, state: Any, k: int, noise: Noise) -> Any:
    problem.condition["label"].fill_(0)
    return state, noise


def changed_start(_: Any, problem: Problem, state: Any, k: int, noise: Noise) -> Any:
    if problem.start is not None:
        problem.start.add_(1.0)
    return state, noise


MEMORY: list[Tensor] = []


def remembers(_: Any, problem: Problem, state: Any, k: int, noise: Noise) -> Any:
    """What it needs of the last step is not in the state."""
    last = MEMORY.pop() if MEMORY and MEMORY[0].shape == state.x.shape else 0.0
    MEMORY[:] = [1e-3 * state.x]
    return (state if k == 0 else state._replace(x=state.x + last)), noise


def needs(**changed: Any) -> dict[str, Any]:
    return {"requires": replace(DPS.requires, **changed)}


def untold(self: Any, problem: Problem, state: Any, k: int, noise: Noise) -> Any:
    return DPS.step(self, problem._with(condition={}), state, k, noise)


def short(self: Any, state: Any) -> Tensor:
    return state.denoised[:1]


NARROW = {"estimate": lambda self, state: 0.7 * state.denoised}
MISTAKES: list[tuple[str, str, dict[str, Any]]] = [
    ("settings described", "eta is not described", {"__doc__": "A solver."}),
    ("settings round trip", "made of its settings", {"settings": {"solver": "Planted", "num_steps": 7}}),
    ("settings round trip", "has no hash", {"__hash__": None}),
    ("settings round trip", "can be changed", {"__setattr__": lambda self, name, value: None}),
    ("states", "is torch.float64 in a run of torch.float32", {
        "init": lambda self, problem, noise: type(s := DPS.init(self, problem, noise))(*(t.double() for t in s))
    }),
    ("states", "estimate has the shape", {"estimate": short}),
    ("states", "estimate is torch.float32", {"estimate": lambda self, state: state.denoised.float()}),
    ("inputs unchanged", "x of the state", {"step": before(changed_state)}),
    ("inputs unchanged", "it changes y", {"step": before(changed_y)}),
    ("inputs unchanged", "it changes prior", {"step": before(changed_prior)}),
    ("inputs unchanged", "condition label", {"step": before(changed_condition)}),
    ("inputs unchanged", "it changes init", {"step": before(changed_start)}),
    ("seed", "the same seed gives samples that differ", {"step": before(global_noise)}),
    ("seed", "are the same for another seed", {
        "step": before(one_seed),
        "init": lambda self, problem, noise: DPS.init(self, problem, replace(noise, seed=0)),
    }),
    ("seed", "two samples of one measurement", {
        "step": before(one_row),
        "init": lambda self, problem, noise: DPS.init(
            self, problem, replace(noise, rows=((0, 0),) * len(noise.rows))
        ),
    }),
    ("rows independent", "in chunks of 1", {"step": before(batch_mean)}),
    ("rows independent", "in chunks of 1", {"step": before(neighbours)}),
    ("rows independent", "in chunks of", {"step": before(place)}),
    ("resume", "stopped after 4 of 12 steps", {"step": before(remembers)}),
    ("refusals", "a reward without a gradient: `requires` allows it", needs(gradient=False)),
    ("refusals", "prior_vjp is False in `requires`", needs(prior_vjp=False)),
    ("conditions", "under two conditions", {"step": untold}),
    ("unconditional control", r"have 0\.6\d+ times the spread", NARROW),
    ("unconditional control", "have a mean", {"estimate": lambda self, state: state.denoised + 1.0}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("promise", "text", "body"), MISTAKES)
def test_planted_mistakes_are_named(
    promise: str, text: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Solver, "registry", dict(Solver.registry))
    with pytest.raises(ContractError, match=text) as caught:
        check_solver(planted(**body))
    assert caught.value.promise == promise, caught.value
    assert str(caught.value).startswith("Planted(")


def test_a_constructor_that_takes_no_steps_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "check", lambda who, name, value, rule: value)
    with pytest.raises(
        ContractError, match="'settings refused': the constructor takes num_steps=0"
    ):
        check_solver(DPS(6))


def test_a_setting_without_a_rule_is_named():
    @dataclass(frozen=True)
    class Planted(DPS):
        strength: float = 1.0

    Planted.__doc__ = f"{DPS.__doc__}    strength: Of it. Default 1.0; never.\n"
    with pytest.raises(
        ContractError, match=r"takes strength=<object.*annotate strength with a rule"
    ):
        check_solver(Planted(6))


def test_members_may_interact_and_network_batches_may_not_matter(monkeypatch: pytest.MonkeyPatch):
    def batches(self: Problem, x: Tensor, sigma: Any) -> Tensor:
        return denoise(self, x, sigma) * (1 + 1e-9 * (self.batch_size or 0))

    denoise = Problem.denoise
    monkeypatch.setattr(Problem, "denoise", batches)
    with pytest.raises(ContractError, match="'rows independent': in network batches of 1"):
        check_solver(EnKG(6, 12))


def test_exceptions_are_for_promises_that_are_broken():
    with pytest.raises(
        ContractError, match=r"keeps the promise 'seed'.*\(no reason at all\): take it out"
    ):
        check_solver(HQS(6), exceptions={"seed": "no reason at all"})
    with pytest.raises(InputError, match="no promise 'sead'; did you mean 'seed'"):
        check_solver(HQS(6), exceptions={"sead": "none"})
    with pytest.raises(InputError, match="'seed' has no reason"):
        check_solver(HQS(6), exceptions={"seed": " "})


def test_a_condition_has_no_closed_form():
    """The law under a label is another one than that of the prior."""
    problem = Problem(
        clusters(), far_apart().likelihood, condition={"label": torch.tensor([0, 1])}
    )
    with pytest.raises(CompatibilityError, match=r"closed form .*, and no condition"):
        ig.driver.run(ExactPosterior(), problem, progress=False)
    assert not isinstance(choose(problem, 4).solver, ExactPosterior)


def test_a_reward_of_its_own_kind_has_to_be_given():
    with pytest.raises(InputError, match="needs a reward of the kind EditReward; give problem"):
        check_solver(MotionGuidance(6))


def test_generators_and_registry_are_as_they_were():
    torch.manual_seed(5)
    before, known = torch.get_rng_state(), dict(Solver.registry)
    check_solver(HQS(6))
    assert torch.equal(torch.get_rng_state(), before)
    assert Solver.registry == known
