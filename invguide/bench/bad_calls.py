"""Wrong calls of the whole public interface, generated: none may end in a raw error, hang, or give nonsense.

Every public function and constructor is found by introspection, one or two of its arguments are replaced by values of
the pool below, and what comes back is used once. Fine are an error of invguide's own, and a result that is finite.
"""

from __future__ import annotations

import inspect
import io
import math
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import invguide as ig
from invguide import driver
from invguide.bench.bad_values import ON_PURPOSE, pool
from invguide.bench.patience import Impatient, patience
from invguide.errors import InvguideError
from invguide.system.tables import markdown

MODULES = ("operators", "solvers", "priors", "rewards", "noise")
LEFT_OUT = {"InvguideError", "Result", "NetworkPrior"}  # public, but made by us alone
SHAPE = (3, 8, 8)


# ---- what is called, and with what it would work


@dataclass(frozen=True)
class Target:
    """A public callable and arguments that it takes."""

    name: str
    call: Callable[..., Any]
    good: dict[str, Any]
    check: Callable[[Call, Any], str] | None = None  # of what comes back, in place of `use`

    @property
    def arguments(self) -> list[str]:
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        found = [
            p.name for p in inspect.signature(self.call).parameters.values() if p.kind not in kinds
        ]
        return found + [name for name in self.good if name not in found]

    def value(self, name: str) -> Any:
        """What an argument is in a good call."""
        parameter = inspect.signature(self.call).parameters.get(name)
        default = None if parameter is None else parameter.default
        return self.good.get(name, default)


def _mean(features: dict[str, Tensor]) -> Tensor:
    return features["net"].mean((1, 2, 3))


class _Net(nn.Module):
    """A network that predicts no noise."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return 0 * x


class _Same(nn.Module):
    """An autoencoder whose latents are the picture."""

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, z: Tensor) -> Tensor:
        return z


# Longer than 60 lines: one entry for each kind of argument.
def good_arguments() -> dict[str, dict[str, Any]]:
    """Arguments that each public callable needs, by its name; those with defaults are left to them."""
    prior = ig.priors.GaussianField(SHAPE, scale=0.2, shift=0.5).float()
    y, identity = torch.full((1, *SHAPE), 0.5), ig.operators.Identity()
    quick, learned = ig.solvers.DPS(num_steps=2), ig.priors.from_network(_Net(), shape=SHAPE)
    problem = {"operator": identity, "prior": prior, "sigma_y": 0.1}
    run = {"seed": 0, "batch_size": "auto", "device": "cpu", "dtype": None, "progress": False}
    run |= {"callbacks": (), "checkpoint": None, "checkpoint_every": 10, "on_nonfinite": "raise"}
    likelihood = ig.Likelihood(identity, y, 0.1)
    reward = ig.as_reward(lambda x: -x.square().mean((1, 2, 3)))
    kernel, mask = torch.full((3, 3), 1 / 9), torch.eye(8)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    layers = nn.Conv2d(3, 4, 3, padding=1)
    mean, covariance = torch.zeros(4), torch.eye(4)
    roll = {"prior": prior, "x": 2 * y, "sigmas": (1.0, 0.5, 0.0)}
    return {
        "solve": {"y": y, **problem, "mask": None, "solver": quick, **run},
        "plan": {"y": y, **problem, "solver": quick, "device": "cpu"},
        "guide": {"prior": prior, "reward": reward, "solver": quick, **run},
        "driver.run": {"solver": quick, "problem": ig.Problem(prior, likelihood), **run},
        "load_prior": {"where": "natural-tiny"},
        "as_operator": {"model": identity},
        "as_reward": {"value": reward},
        "to_deepinv": {"operator": identity},
        "adjoint.rollout": roll,
        "adjoint.rollout_gradient": {**roll, "loss": lambda x: x.mean((1, 2, 3))},
        "BlackBox": {"function": np.abs},
        "Command": {"template": "cp {input} {output}"},
        "Likelihood": {"operator": identity, "y": y, "noise": 0.1},
        "Problem": {"prior": prior, "likelihood": likelihood},
        "operators.Blur": {"kernel": kernel},
        "operators.NonlinearBlur": {"kernel": kernel},
        "operators.Composition": {},
        "operators.GaussianBlur": {"sigma": 1.0},
        "operators.Inpainting": {"mask": mask},
        "operators.JPEG": {"quality": 50},
        "operators.JPEGCoefficients": {"size": (8, 8)},
        "operators.MotionBlur": {"length": 3.0},
        "operators.SuperResolution": {"factor": 2},
        "priors.Gaussian": {"mean": mean, "covariance": covariance},
        "priors.GaussianField": {"shape": SHAPE},
        "priors.GaussianMixture": {"means": torch.eye(4), "covariance": covariance},
        "priors.FieldPosterior": {"prior": prior, "A": identity, "y": y, "sigma_y": 0.1},
        "priors.Grey": {"prior": prior},
        "priors.Padded": {"prior": prior},
        "priors.Tiled": {"prior": prior},
        "priors.LatentPrior": {"prior": prior, "autoencoder": _Same(), "scaling_factor": 1.0, "factor": 1},
        "priors.embed_text": {"where": "none/there", "prompt": "a"},
        "priors.read_weights": {"path": "none.safetensors"},
        "priors.from_network": {"net": _Net(), "shape": SHAPE},
        "rewards.RAFT": {"weights": None},
        "rewards.ClassLogProb": {"classifier": network, "label": 1},
        "rewards.ColourHistogram": {"reference": y[0]},
                "rewards.Perceptual": {"features": layers, "reference": y[0]},
        "rewards.Style": {"features": layers, "reference": y[0]},
        "rewards.FeatureReward": {"prior": learned, "modules": "net", "function": _mean},
        "rewards.FunctionReward": {"function": lambda x: x.mean((1, 2, 3))},
        "rewards.Motion": {"source": y[0], "flow": torch.zeros(2, 8, 8)},
        "rewards.Palette": {"colours": [(0, 0, 0), (1, 1, 1)]},
        "rewards.SoftPalette": {"colours": [(0, 0, 0), (1, 1, 1)]},
        "rewards.SegmentationAgreement": {"segmenter": layers, "labels": torch.ones(8, 8).long()},
        "rewards.Weighted": {"parts": ((1.0, reward),)},
        "rewards.as_reward": {"value": reward},
        "rewards.softened": {"network": nn.Sequential(nn.ReLU())},
        "noise.Gaussian": {"sigma_y": 0.1},
        "noise.Poisson": {"gain": 0.1},
        "noise.Quantised": {"step": 0.1},
        "noise.CorrelatedGaussian": {"covariance": torch.eye(192)},
        "noise.BlockGaussian": {"covariances": [torch.eye(128), 2 * torch.eye(64)]},
        "noise.LowRankGaussian": {"sigma_y": 0.1, "factor": torch.ones(192, 2)},
        "noise.PoissonGaussian": {"gain": 0.1, "sigma_y": 0.1},
        "noise.Laplace": {"scale": 0.1},
        "noise.StudentT": {"scale": 0.1},
        "noise.Rician": {"sigma_y": 0.1},
        "noise.Uniform": {"half_width": 0.1},
        "noise.LogDensity": {"log_density": lambda p, y: -(p - y).square().flatten(1).sum(1)},
    }  # fmt: skip


def targets() -> list[Target]:
    """Every public callable. One of which nobody said what it needs fails when it is called without."""
    good = good_arguments()
    found: dict[str, Callable[..., Any]] = {}
    for name in ig.__all__:
        found[name] = getattr(ig, name)
    for module in MODULES:
        home = getattr(ig, module)
        public = getattr(home, "__all__", None) or [
            n for n, v in vars(home).items() if getattr(v, "__module__", "") == home.__name__
        ]
        found |= {f"{module}.{n}": getattr(home, n) for n in public if not n.startswith("_")}
    found |= {f"adjoint.{n}": getattr(ig.adjoint, n) for n in ("rollout", "rollout_gradient")}
    found["driver.run"] = driver.run
    return [
        Target(name, call, good.get(name, {}))
        for name, call in sorted(found.items())
        if callable(call)
        and not inspect.isabstract(call)
        and name.rpartition(".")[2] not in LEFT_OUT
    ]


# ---- one call, and what came of it


@dataclass(frozen=True)
class Call:
    """One wrong call: which target, and the arguments that replace good ones."""

    target: Target
    wrong: dict[str, Any]

    def __str__(self) -> str:
        words = (f"{name}={_short(value)}" for name, value in self.wrong.items())
        return f"{self.target.name}({', '.join(words)})"


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    if isinstance(value, (np.ndarray, Tensor)) and value.ndim:
        text = f"{type(value).__name__}{tuple(value.shape)} of {value.dtype}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def calls(count: int, seed: int = 0, where: list[Target] | None = None) -> Iterator[Call]:
    """`count` wrong calls of these targets, by default all of `targets()`, each in turn.

    One or two arguments are from the pool, or there is an unknown one. Half of the values are of the kind that belongs
    there: those get further in.
    """
    rng, where = np.random.default_rng(seed), where or targets()

    def draw(values: dict[str, list[Any]], like: Any = None) -> Any:
        kind = "array" if isinstance(like, Tensor) else "number"
        if rng.random() < 0.5 or not isinstance(like, (int, float, Tensor)):
            kind = ("number", "object", "array")[rng.integers(3)]
        return values[kind][rng.integers(len(values[kind]))]

    for i in range(count):
        target, values = where[i % len(where)], pool()
        names = target.arguments
        some = rng.permutation(len(names))[: 1 + (rng.random() < 0.2)]
        wrong = {names[k]: draw(values, target.value(names[k])) for k in some}
        if not names or rng.random() < 0.02:
            wrong = {"nonsense": draw(values)}
        yield Call(target, wrong)


def outcome(call: Call) -> tuple[str, str]:
    """What a call came to: "refused", "taken", "raw", "wrong" or "hung", and the words that tell more."""
    try:
        with patience(), _quiet(), warnings.catch_warnings(), torch.random.fork_rng([]):
            warnings.simplefilter("ignore")
            made = call.target.call(**{**call.target.good, **call.wrong})
            fault = use(made) if call.target.check is None else call.target.check(call, made)
    except InvguideError as error:
        text = " ".join(str(error).split())
        return ("refused", text) if text else ("raw", f"{type(error).__name__} without a word")
    except Impatient:
        return "hung", "interrupted"
    except Exception as error:
        if str(error) == ON_PURPOSE:  # of the user's own function, which has to reach its author
            return "refused", ON_PURPOSE
        return "raw", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ("wrong", fault) if fault else ("taken", "")


@contextmanager
def _quiet() -> Iterator[None]:
    """What `check` prints is no answer."""
    with redirect_stdout(io.StringIO()):
        yield


def use(made: Any) -> str:
    """Use once what a call returned; what is wrong with the answer, or nothing."""
    x = torch.full((1, *SHAPE), 0.4)
    if isinstance(made, ig.Result):
        return "" if bool(torch.isfinite(made.samples).all()) else "samples that are not finite"
    if isinstance(made, ig.Solver):
        numbers = [v for v in made.settings.values() if isinstance(v, float)]
        if any(map(math.isnan, numbers)) or not 1 <= made.num_steps <= 10**9:
            return f"settings {made.settings}"
        return ""
    if isinstance(made, ig.BlackBox | ig.Command):
        return ""  # starts processes
    if isinstance(made, ig.Prior):
        point = torch.ones(1, *(size or 8 for size in made.shape), dtype=made.dtype)
        return _finite(made.denoise(point, 1.0), point.shape)
    if isinstance(made, ig.Operator):
        return _finite(made(x), None)
    if isinstance(made, ig.Reward):
        return _finite(made(x), torch.Size([1]))
    if isinstance(made, ig.Likelihood):
        return _finite(made.log_prob(x), torch.Size([1]))
    if isinstance(made, ig.noise.NoiseModel):
        law = made.bind(x)
        return _finite(law.log_density(x + 0.01, x), torch.Size([1]))
    if isinstance(made, Tensor):
        return _finite(made, None)
    return ""


def _finite(value: Tensor, shape: torch.Size | None) -> str:
    if shape is not None and value.shape != shape:
        return f"shape {tuple(value.shape)}, not {tuple(shape)}"
    return "" if bool(torch.isfinite(value).all()) else "values that are not finite"


# ---- many calls


@dataclass
class Tally:
    """How many calls came to what, by target, and those that should not have; prints as a table."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def add(self, call: Call, kind: str, words: str) -> None:
        self.counts.setdefault(call.target.name, Counter())[kind] += 1
        if kind in ("raw", "wrong", "hung"):
            self.faults.append(f"{kind}: {call}: {words}")

    def __str__(self) -> str:
        kinds = ("refused", "taken", "raw", "wrong", "hung")
        rows = [[name, *(str(c[k]) for k in kinds)] for name, c in sorted(self.counts.items())]
        total = sum(self.counts.values(), Counter())
        rows.append(["all", *(str(total[k]) for k in kinds)])
        note = (
            "Refused: by an error of this package, in words. Taken: what came of it is finite and has its shape. Raw: "
            "another error. Wrong: what came of it cannot be used. Hung: no answer in time. The last three are faults."
        )
        faults = [f"- {fault}" for fault in self.faults]
        return "\n\n".join([markdown(["called", *kinds], rows), note, *faults])


def bad_calls(
    count: int = 1000,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
    where: list[Target] | None = None,
) -> Tally:
    """Make `count` wrong calls in an empty folder and tell what came of them."""
    tally = Tally()
    with _elsewhere():
        for call in calls(count, seed, where):
            if say is not None:
                say(str(call))
            tally.add(call, *outcome(call))
    return tally


@contextmanager
def _elsewhere() -> Iterator[None]:
    """An empty working folder, for what is written by mistake."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)
