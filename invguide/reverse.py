"""The single reverse steps that solvers share, from level a to level b < a, in x = x0 + sigma n.

`denoised` is D(x; a), possibly guided; `n` is a standard normal shaped like x. Levels are floats or 0-d tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor


def euler(x: Tensor, denoised: Tensor, a: float, b: float) -> Tensor:
    """Probability-flow Euler step, which is DDIM with eta = 0 (arXiv 2206.00364, alg. 1; 2010.02502, eq. 12)."""
    return denoised + (b / a) * (x - denoised)


def heun(
    x: Tensor, denoised: Tensor, a: float, b: float, denoise: Callable[[Tensor, float], Tensor]
) -> Tensor:
    """Second-order probability-flow step (arXiv 2206.00364, alg. 1); one more denoiser call unless b is 0."""
    proposal = euler(x, denoised, a, b)
    if b == 0:
        return proposal
    slope = (x - denoised) / a + (proposal - denoise(proposal, b)) / b
    return x + 0.5 * (b - a) * slope


def ancestral(x: Tensor, denoised: Tensor, a: float, b: float, n: Tensor) -> Tensor:
    """Draw from N(x_b | x_a, x0 = D), the DDPM posterior (arXiv 2006.11239, eq. 6-7)."""
    return ddim(x, denoised, a, b, n, eta=1.0)


def ddim(x: Tensor, denoised: Tensor, a: float, b: float, n: Tensor, eta: float) -> Tensor:
    """DDIM step whose noise is eta times the ancestral one (arXiv 2010.02502, eq. 12 and 16)."""
    fresh = eta * b * math.sqrt(max(a**2 - b**2, 0.0)) / a
    return denoised + math.sqrt(max(b**2 - fresh**2, 0.0)) * (x - denoised) / a + fresh * n


def mix_noise(x: Tensor, denoised: Tensor, a: float, b: float, n: Tensor, zeta: float) -> Tensor:
    """D + b (sqrt(1 - zeta) eps + sqrt(zeta) n): zeta = 1 redraws all noise (DiffPIR, arXiv 2305.08995, eq. 13).

    Not the eta of DDIM: at zeta = 1 nothing of x is kept.
    """
    return denoised + b * (math.sqrt(1 - zeta) * (x - denoised) / a + math.sqrt(zeta) * n)


def renoise(x: Tensor, b: float, a: float, n: Tensor) -> Tensor:
    """Jump back up from level b to level a > b (time travel): x + sqrt(a^2 - b^2) n."""
    return x + math.sqrt(max(a**2 - b**2, 0.0)) * n
