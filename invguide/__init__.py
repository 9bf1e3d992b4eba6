"""invguide: turn any pretrained diffusion model into a solver of inverse problems, with no training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from invguide import adjoint, noise, priors
from invguide.api import guide, load_prior, solve
from invguide.errors import InvguideError
from invguide.forward_operator import LinearOperator, Operator
from invguide.likelihood import Likelihood
from invguide.prior import Prior
from invguide.problem import Problem
from invguide.result import Result
from invguide.reward import Reward, as_reward
from invguide.solver import Solver

if TYPE_CHECKING:
    from invguide import rewards
    from invguide.adapters import as_operator, to_deepinv
    from invguide.blackbox import BlackBox, Command
    from invguide.planning import plan

__all__ = [
    "BlackBox",
    "Command",
    "InvguideError",
    "Likelihood",
    "LinearOperator",
    "Operator",
    "Prior",
    "Problem",
    "Result",
    "Reward",
    "Solver",
    "adjoint",
    "as_operator",
    "as_reward",
    "guide",
    "load_prior",
    "noise",
    "plan",
    "priors",
    "rewards",
    "solve",
    "to_deepinv",
]


def __getattr__(name: str) -> Any:
    """Import what few need only when asked for, so that `import invguide` stays as fast as torch allows."""
    if name in ("as_operator", "to_deepinv"):
        return getattr(import_module("invguide.adapters"), name)
    if name in ("BlackBox", "Command"):
        return getattr(import_module("invguide.blackbox"), name)
    if name == "plan":
        return import_module("invguide.planning").plan
    if name == "rewards":
        return import_module("invguide.rewards")
    raise AttributeError(f"module 'invguide' has no attribute {name!r}")
