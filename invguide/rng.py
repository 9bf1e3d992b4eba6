"""Standard normals keyed by (seed, measurement, sample, step, purpose), whatever the batch, device or resume."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """The only source of randomness that a solver sees.

    Each draw comes from its own counter-based stream (Philox): the key holds the seed and the purpose, the counter
    holds measurement, sample and step. Drawn on the CPU in float32 or float64, then moved.

    Attributes:
        seed: Seed of the run.
        rows: (measurement index, sample index) of each row of the batch.
        step: -1 during `init`, else the index of the step.
        shape: Default shape of one row.
    """

    seed: int
    rows: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    step: int = -1

    def at(self, step: int) -> Noise:
        return replace(self, step=step)

    def __call__(self, purpose: str = "", shape: tuple[int, ...] | None = None) -> Tensor:
        """Return standard normals (B, *shape); a second call with the same purpose returns the same numbers."""
        return self._draw(purpose, shape, "standard_normal")

    def uniform(self, purpose: str = "", shape: tuple[int, ...] | None = None) -> Tensor:
        """Return uniforms on [0, 1), (B, *shape), independent of the normals of the same purpose."""
        return self._draw(purpose + "/uniform", shape, "random")

    def _draw(self, purpose: str, shape: tuple[int, ...] | None, law: str) -> Tensor:
        shape = self.shape if shape is None else shape
        kind = np.float64 if self.dtype == torch.float64 else np.float32
        out = np.empty((len(self.rows), *shape), kind)
        stream = np.random.Philox(key=[self.seed & (2**64 - 1), zlib.crc32(purpose.encode())])
        draw = getattr(np.random.Generator(stream), law)
        # Setting the counter of one generator is four times as fast as making a generator per row.
        state = stream.state
        for i, (measurement, sample) in enumerate(self.rows):
            state["state"]["counter"][:] = (0, self.step + 1, sample, measurement)
            stream.state = state
            out[i] = draw(shape, dtype=kind)
        return torch.from_numpy(out).to(device=self.device, dtype=self.dtype)
