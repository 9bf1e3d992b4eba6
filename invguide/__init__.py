"""invguide: turn any pretrained diffusion model into a solver of inverse problems, with no training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from invguide.renamed import keep_old_names

if TYPE_CHECKING:
    from invguide import adjoint, noise, priors, rewards
    from invguide.adapters import as_operator, to_deepinv
    from invguide.api import guide, load_prior, solve
    from invguide.blackbox import BlackBox, Command
    from invguide.errors import InvguideError
    from invguide.forward_operator import LinearOperator, Operator
    from invguide.images.example import example_photo
    from invguide.likelihood import Likelihood
    from invguide.planning import plan
    from invguide.prior import Prior
    from invguide.problem import Problem
    from invguide.result import Result
    from invguide.reward import Reward, as_reward
    from invguide.solver import Solver

# Where names come from when they are first asked for: the command line answers `--help` without torch.
_MODULES = (
    "adjoint", "bench", "driver", "errors", "noise", "operators", "priors", "rewards", "solvers", "testing",
    "verify",
)  # fmt: skip
_HOME = {
    "BlackBox": "blackbox",
    "Command": "blackbox",
    "InvguideError": "errors",
    "Likelihood": "likelihood",
    "LinearOperator": "forward_operator",
    "Operator": "forward_operator",
    "Prior": "prior",
    "Problem": "problem",
    "Result": "result",
    "Reward": "reward",
    "Solver": "solver",
    "as_operator": "adapters",
    "as_reward": "reward",
    "example_photo": "images.example",
    "guide": "api",
    "load_prior": "api",
    "plan": "planning",
    "solve": "api",
    "to_deepinv": "adapters",
}

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
    "example_photo",
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
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("invguide")
        except PackageNotFoundError:  # a folder of the sources on the path
            return "unknown"
    if name in _MODULES:
        return import_module(f"invguide.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'invguide' has no attribute {name!r}")
    value = getattr(import_module(f"invguide.{_HOME[name]}"), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, "__version__"})


keep_old_names()
