"""What a target has answered during a run: whether there was anything in it to go by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# An answer is absurd where it lies this many times farther from the middle of its ensemble than three quarters of the
# members do, and than the middle itself is large. Of a normal law or of Student's t with 3 degrees of freedom none in
# 10^7 members is, of exp(2 n), n normal, one in 10^4; -9999 or 1e30 among numbers of order one are.
ABSURD = 1000.0
FEWEST = 8  # members that can tell
# Values that are equal to ROUNDING of themselves are one value, in single precision too; norms of signals whose
# squares differ by DIFFERENT belong to signals that do.
ROUNDING, DIFFERENT = 4e-6, 1e-3
Range = tuple[float, float]  # least and largest


@dataclass
class Seen:
    """Values of the log target by measurement, and members that were left out.

    Attributes:
        asked: Signals whose value was asked for, by measurement.
        finite: Those whose value was finite.
        values, sizes: Least and largest finite value, and square of the norm of the signals that had one.
        absurd: By index of the member: how often its answer was absurd, and by how much at most.
    """

    asked: dict[int, int] = field(default_factory=dict)
    finite: dict[int, int] = field(default_factory=dict)
    values: dict[int, Range] = field(default_factory=dict)
    sizes: dict[int, Range] = field(default_factory=dict)
    absurd: dict[int, tuple[int, float]] = field(default_factory=dict)

    def add(self, origin: Tensor, x0: Tensor, values: Tensor) -> None:
        """Note values (B,) at signals x0 (B, *shape) that belong to measurements `origin` (B,)."""
        sizes = x0.detach().flatten(1).square().sum(1)
        pair = torch.stack([values.detach().to(sizes), sizes]).cpu()
        for b in (
            {int(origin.min()), int(origin.max())} if len(origin) < 3 else origin.unique().tolist()
        ):
            own = pair[:, origin == b]
            good = own[:, own.isfinite().all(0)]
            self.asked[b] = self.asked.get(b, 0) + own.shape[1]
            if good.shape[1]:
                self.finite[b] = self.finite.get(b, 0) + good.shape[1]
                (least, small), (most, large) = good.amin(1).tolist(), good.amax(1).tolist()
                self.values[b] = _wider(self.values.get(b), least, most)
                self.sizes[b] = _wider(self.sizes.get(b), small, large)

    def constant(self, b: int) -> bool:
        """Whether signals of measurement b differed, and their values did not, to rounding."""
        if b not in self.values:
            return False
        (low, high), (small, large) = self.values[b], self.sizes[b]
        return high - low <= ROUNDING * abs(high) and large - small > DIFFERENT * large

    def without_absurd(self, residuals: Tensor) -> Tensor:
        """Residuals (J, m) of an ensemble of one measurement, NaN in the rows of absurd members, which are noted."""
        excess = excess_of(residuals)
        for i in (excess > ABSURD).nonzero().flatten().tolist():
            count, worst = self.absurd.get(i, (0, 0.0))
            self.absurd[i] = count + 1, max(worst, excess[i].item())
        return torch.where((excess > ABSURD)[:, None], torch.nan, residuals)

    def warning(self, b: int, who: str) -> str:
        """What is odd about measurement b, or empty: the signal did not matter, or members were absurd."""
        if self.constant(b):
            return (
                f"{who} is constant: it gave the same value for all {self.finite[b]} signals of measurement {b}, so "
                f"that nothing but the prior decides the samples"
            )
        if not self.absurd:
            return ""
        names = sorted(self.absurd)
        listed = ", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else "")
        times = sum(count for count, _ in self.absurd.values())
        worst = max(excess for _, excess in self.absurd.values())
        return (
            f"{who} gave absurd numbers for {len(names)} members of the ensemble ({listed}), {times} times in all and "
            f"up to {worst:.2g} times farther off than three quarters of the others; each was left out there as a "
            f"failed call. A simulator that raises, or returns NaN, says so itself"
        )

    def content(self) -> dict[str, Any]:
        """Ready for a checkpoint."""
        counts = {name: [[b, n] for b, n in getattr(self, name).items()] for name in COUNTS}
        pairs = {name: [[b, *p] for b, p in getattr(self, name).items()] for name in PAIRS}
        return counts | pairs

    @classmethod
    def of(cls, content: dict[str, Any]) -> Seen:
        """What `content` gave."""
        counts = {name: {int(b): int(n) for b, n in content[name]} for name in COUNTS}
        pairs = {name: {int(b): (p, q) for b, p, q in content[name]} for name in PAIRS}
        return cls(**counts, **pairs)  # pyright: ignore[reportArgumentType]


COUNTS, PAIRS = ("asked", "finite"), ("values", "sizes", "absurd")


def _wider(known: Range | None, low: float, high: float) -> Range:
    return (low, high) if known is None else (min(known[0], low), max(known[1], high))


def excess_of(residuals: Tensor) -> Tensor:
    """How many times farther each member (J, m) is from the middle of all than three quarters are, (J,); 0 where few.

    The middle is the median of each number, and distances are those of the number that is farthest off.
    """
    alive = residuals.isfinite().all(1)
    excess = torch.zeros(len(residuals), dtype=torch.float64, device=residuals.device)
    if int(alive.sum()) < FEWEST:
        return excess
    known = residuals[alive].double()
    middle = known.median(0).values
    distance = (known - middle).abs().amax(1)
    usual = torch.maximum(distance.quantile(0.75), middle.abs().max())
    excess[alive] = torch.where(usual > 0, distance / usual, 0.0)
    return excess
