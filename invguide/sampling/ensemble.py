"""What ensemble Kalman methods share: roll-outs, survivors, gains in ensemble space, localisation.

Members are rows: signals x (J, *shape), whitened residuals r = (y - A x0) / sigma_y (J, m), so that the noise of a
measurement has covariance I. A member whose forward model failed has a NaN row. No d x m or m x m matrix is formed
unless it is smaller than the ensemble; localisation works on blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from invguide.errors import DivergenceError
from invguide.problem.problem import Problem
from invguide.reverse import euler, heun
from invguide.schedule import level_list

# From the anomalies of the residuals R~ (S, m), the innovations (S, m) and a strength: G (S, m), such that a member
# with innovation r moves by -X~^T G r, with X~ (S, d) the anomalies of the members.
Gain = Callable[[Tensor, Tensor, float], Tensor]
BLOCK = 2**22  # entries of the localised covariance held at a time


def roll_out_levels(problem: Problem, sigma: float, num_steps: int) -> Sequence[float]:
    """Levels of a roll-out from level sigma to a clean signal, num_steps steps."""
    low = problem.prior.sigma_min
    return level_list("karras", num_steps, low, max(sigma, low))


def roll_out(
    problem: Problem, x: Tensor, levels: Sequence[float], second_order: bool = False
) -> Tensor:
    """Clean signals that the probability flow leads to from x at the first of the levels, through all of them.

    Euler's method, one network call a step, or Heun's, two but for the last step.
    """
    for a, b in pairwise(levels):
        denoised = problem.denoise(x, a)
        if second_order:
            x = heun(x, denoised, a, b, problem.denoise)
        else:
            x = euler(x, denoised, a, b)
    return x


def survivors(*parts: Tensor) -> Tensor:
    """Which members are finite in every part, (J,) booleans.

    Raises:
        DivergenceError: Fewer than two are: they have no covariance.
    """
    alive = torch.stack([part.flatten(1).isfinite().all(1) for part in parts]).all(0)
    count = int(alive.sum())
    if count < 2:
        raise DivergenceError(
            f"{count} of {len(alive)} members of the ensemble survived the forward model; expected at least 2. It "
            f"returned NaN for the others: look into its failures, or give it a larger ensemble_size"
        )
    return alive


def kalman_gain(anomalies: Tensor, innovations: Tensor, strength: float) -> Tensor:
    """X~^T G = C_xr (C_rr + I / strength)^-1, solved in measurement or ensemble space (push-through)."""
    size, m = anomalies.shape
    noise = size / strength
    if m <= size:
        system = anomalies.mT @ anomalies + noise * _identity(m, anomalies)
        return torch.linalg.solve(system, anomalies.mT).mT
    return torch.linalg.solve(
        anomalies @ anomalies.mT + noise * _identity(size, anomalies), anomalies
    )


def normalised_gain(anomalies: Tensor, innovations: Tensor, strength: float) -> Tensor:
    """X~^T G = C_xr strength / |K|_F, K the matrix of products of innovations and anomalies over S (released EnKG).

    Units and noise level cancel, and all members together move by at most strength * |X~|.
    """
    norm = (innovations @ anomalies.mT).norm()
    return anomalies * torch.where(norm > 0, strength / norm, 0.0)


def correct(
    x: Tensor,
    residuals: Tensor,
    innovations: Tensor,
    gain: Gain,
    strength: float,
    *,
    localised: bool = False,
    inflation: float = 1.0,
) -> Tensor:
    """Move an ensemble towards its measurement: x_j - X~^T G r_j, (J, *shape).

    Covariances are those of the survivors, over their number. A member that failed moves with their mean, so that it
    stays among them and may succeed next time. `inflation` multiplies the distances to the mean afterwards.

    Args:
        x: Members, (J, *shape).
        residuals: Whitened residuals, (J, m), NaN where the forward model failed.
        innovations: What is to be explained: the residuals, or these with noise added.
        gain: `kalman_gain` or `normalised_gain`.
        strength: Passed to gain: the weight of the measurement, or the size of the step.
        localised: Damp the entries of the gain X~^T G whose correlations this ensemble cannot tell from zero; see
            `significance`.
        inflation: 1 is none.
    """
    alive = survivors(residuals, x)
    members = x[alive].flatten(1)
    anomalies = _centred(residuals[alive].double())
    wanted = innovations[alive].double()
    G = gain(anomalies, wanted, strength)
    shift = _localised_shift if localised else _shift
    moved = members - shift(_centred(members), anomalies, G, wanted)
    mean = moved.mean(0)
    out = x.flatten(1) + (mean - members.mean(0))
    out[alive] = moved
    return (mean + inflation * (out - mean)).reshape(x.shape)


def _shift(inputs: Tensor, anomalies: Tensor, G: Tensor, innovations: Tensor) -> Tensor:
    size, m = anomalies.shape
    if 2 * m <= size:  # the gain is smaller than the ensemble
        return innovations.to(inputs) @ (G.mT.to(inputs) @ inputs)
    return (innovations @ G.mT).to(inputs) @ inputs


def _localised_shift(inputs: Tensor, anomalies: Tensor, G: Tensor, innovations: Tensor) -> Tensor:
    size, m = anomalies.shape
    spread, parts = anomalies.norm(dim=0), []
    for block in inputs.split(max(1, BLOCK // m), dim=1):
        block = block.double()
        scale = block.norm(dim=0)[:, None] * spread
        correlation = block.mT @ anomalies / scale.clamp_min(torch.finfo(scale.dtype).tiny)
        # The gain, and not C_xr: G has been balanced against all of C_xr, and damping that makes members overshoot.
        gain = block.mT @ G * significance(correlation, size)
        parts.append((innovations @ gain.mT).to(inputs))
    return torch.cat(parts, 1)


def significance(correlation: Tensor, size: int) -> Tensor:
    """Factor q^2 / (1 + q^2) of sampled correlations, q the ratio of each to its own sampling error.

    Needs no geometry: a black box rarely tells where its measurements are. The error is that of Fisher's
    transform, half of tanh(s + e) - tanh(s - e) with s = artanh(correlation) and e = (size - 3)^-1/2. Flowerdew 2015,
    "Towards a theory of optimal localisation", doi 10.3402/tellusa.v67.25257; in ensemble Kalman inversion Lee 2021,
    arXiv 2105.11341.
    """
    square = correlation.square().clamp(max=1.0)
    t = math.tanh((size - 3) ** -0.5) if size > 3 else 1.0
    error = t * (1 - square) / (1 - square * t**2).clamp_min(1e-12)
    return square / (square + error.square()).clamp_min(torch.finfo(square.dtype).tiny)


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(0)


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)
