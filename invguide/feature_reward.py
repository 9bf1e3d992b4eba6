"""FeatureReward: a reward on what modules inside a prior's network return."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from invguide.errors import InputError
from invguide.numerics.hooks import Recorded, find_modules, record
from invguide.prior import Prior
from invguide.reward import Reward, as_scores


@dataclass(frozen=True, repr=False, eq=False)
class FeatureReward(Reward):
    """r(x, sigma) = function(features), what modules of the prior's network return when it denoises x at level sigma.

    `FeatureGuidance` asks it about the noisy state, at no further network call. As a reward of clean signals, for other
    solvers and in results, it is r(x, sigma_min), one call of the network.

    A module that is called several times in one pass, as by priors that combine several branches, is scored each time;
    the mean counts.

    Args:
        prior: The prior that is guided, with a torch.nn.Module inside.
        modules: Dotted names, as in `prior.named_modules()`; of one from `from_network`, "net.<name in the network>".
        function: {name: features (B, ...)} -> (B,), higher is better; such as a trained head and a distance.
        condition: Keywords of a conditional prior for clean signals, one row each. Default None; for priors that need
            one.

    Raises:
        InputError: A module that the prior does not have (the nearest is suggested), or that was not called.
        ShapeError: Not one value per sample.

    Example:
        >>> from invguide.priors import from_network
        >>> prior = from_network(torch.nn.Sequential(torch.nn.Identity()), "x0", "ve", shape=(2,))
        >>> prior.net.forward = lambda x, time: prior.net[0](x)
        >>> FeatureReward(prior, "net.0", lambda f: f["net.0"].sum(1))(torch.ones(3, 2))
        tensor([2., 2., 2.])
    """

    prior: Prior
    modules: str | Sequence[str]
    function: Callable[[dict[str, Tensor]], Tensor]
    condition: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        names = (self.modules,) if isinstance(self.modules, str) else tuple(self.modules)
        find_modules(self.prior, names)
        if not callable(self.function):
            raise InputError(
                f"function is {self.function!r}; expected a callable {{name: features (B, ...)}} -> (B,)"
            )
        object.__setattr__(self, "modules", names)

    def record(self) -> contextlib.AbstractContextManager[Recorded]:
        """Record the features of the network calls made inside."""
        return record(self.prior, self.modules)

    def score(self, recorded: Recorded, x: Tensor) -> Tensor:
        """Score what was recorded while x (B, *shape) was denoised, (B,)."""
        counts = {name: len(found) for name, found in recorded.items()}
        if min(counts.values()) != max(counts.values()):
            raise InputError(
                f"modules were called a different number of times in one pass, {counts}; give each a reward of its own"
            )
        calls = counts[self.modules[0]]
        if calls == 0:
            raise InputError(
                f"modules {', '.join(self.modules)} were not called; give the reward the prior that is guided, and do "
                f"not compile its network"
            )
        scores = [
            as_scores(self.function({n: found[i] for n, found in recorded.items()}), x, repr(self))
            for i in range(calls)
        ]
        return torch.stack(scores).mean(0)

    def __call__(self, x: Tensor) -> Tensor:
        prior = self.prior.to(x.device)
        rows = {
            n: v.to(x.device).expand(len(x), *v.shape[1:])
            for n, v in (self.condition or {}).items()
        }
        with self.record() as recorded:
            prior.denoise(prior.to_normalised(x), x.new_tensor(prior.sigma_min), **rows)
        return self.score(recorded, x)

    def __repr__(self) -> str:
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return f"FeatureReward({type(self.prior).__name__}, {self.modules}, {name})"
