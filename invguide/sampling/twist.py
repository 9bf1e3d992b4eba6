"""Gaussian twists of a reverse diffusion: how well a noisy state will explain the data, and proposals that head there.

Everywhere x0 given x_a is taken as N(D, C) with C = a^2 J, J = dD/dx (Tweedie). One reverse step a -> b is the map

    x_b = D + (b^2 / a^2) (x_a - D) + L e,    L = tau + beta J,    e ~ N(0, I),
    tau^2 = b^2 (a^2 - b^2) / a^2,    (tau + beta)^2 = a^2 - b^2,

whose covariance is the ancestral tau^2 plus what the ancestral step leaves out, ((a^2 - b^2) / a^2)^2 C: exactly where
J is 0 or 1, within 1 % of it between. Proposals are laws of e, so that the ratio of two kernels never needs an inverse.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from invguide.numerics.linear import per_sample
from invguide.problem.problem import Problem

REACH = 0.02  # of differences, in noise levels
HALF_REACH = 0.2  # in half precision, whose rounding would hide a shorter one


class Tangent:
    """D(x; sigma), flattened, and the products J^T v of its Jacobian, row by row.

    The graph is kept where one network call holds all rows; else every product computes it again, one network batch
    at a time, so that memory does not grow with the ensemble.
    """

    def __init__(self, problem: Problem, x: Tensor, sigma: Tensor | float) -> None:
        self.problem, self.x, self.sigma = problem, x, sigma
        self.size = problem.batch_size or len(x)
        whole = torch.arange(len(x))
        self._graph = self._differentiate(problem, x, whole) if len(x) <= self.size else None
        denoised = problem.denoise(x, sigma) if self._graph is None else self._graph[1].detach()
        self.denoised = denoised.flatten(1)

    def _differentiate(self, problem: Problem, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return x, problem.denoise(x, self._levels(index))

    def _levels(self, index: Tensor) -> Tensor | float:
        sigma = self.sigma
        return sigma[index.to(sigma.device)] if isinstance(sigma, Tensor) and sigma.ndim else sigma

    def pull(self, v: Tensor) -> Tensor:
        """J^T v of each row, (J, d) -> (J, d)."""
        self.problem.counters.vjp += len(v)
        v = v.reshape(self.x.shape)
        if self._graph is not None:
            x, denoised = self._graph
            return torch.autograd.grad(denoised, x, v, retain_graph=True)[0].flatten(1)
        parts = []
        for part in torch.arange(len(v)).split(self.size):
            x, denoised = self._differentiate(self.problem.rows(part), self.x[part], part)
            parts.append(torch.autograd.grad(denoised, x, v[part])[0].flatten(1))
        return torch.cat(parts)

    def push(self, v: Tensor) -> Tensor:
        """J v of each row, (J, d) -> (J, d), by a difference: one network call."""
        v = v.reshape(self.x.shape)
        size = v.flatten(1).square().mean(1).sqrt().clamp_min(1e-20)
        share = REACH if self.problem.prior.precision == "fp32" else HALF_REACH
        reach = per_sample(share * self.sigma / size, v)
        moved = self.problem.denoise(self.x + reach * v, self.sigma)
        return ((moved.flatten(1) - self.denoised) / reach.flatten(1)).detach()

    def symmetric(self, v: Tensor) -> Tensor:
        """(J + J^T) v / 2 of each row: for a posterior mean, J is symmetric, for a network about."""
        return (self.pull(v) + self.push(v)) / 2

    def rows(self, index: Tensor) -> Tangent:
        """The tangent at x[index]; all rows belong to one measurement."""
        if torch.equal(index, torch.arange(len(self.x), device=index.device)):
            return self
        return Tangent(self.problem, self.x[index], self._levels(index))

    def draw(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """Shifts (J, d) as x0 - D might be, and about their variance (J,): that of C, averaged over its directions.

        Normals n (J, d) filtered by J, with the energy of C.
        """
        filtered = self.pull(n)
        trace = (n * filtered).sum(1).clamp_min(0)
        size = (trace / filtered.square().sum(1).clamp_min(1e-30)).sqrt()
        return (self.sigma * size)[:, None] * filtered, self.sigma**2 * trace / n.shape[1]


class Linear(Protocol):
    """Residuals value_j + H_j (x0 - D_j), with one matrix H_j (m, d) for each particle."""

    @property
    def value(self) -> Tensor: ...  # (J, m)
    def apply(self, v: Tensor) -> Tensor: ...  # H_j v_j, (J, d) -> (J, m)
    def adjoint(self, u: Tensor) -> Tensor: ...  # H_j^T u_j, (J, m) -> (J, d)


class Twist(NamedTuple):
    """psi = N(value; 0, S), S = I + H C H^T, in eigenvectors of S within the Krylov space of the residual."""

    log_psi: Tensor  # (J,), up to a constant
    residual: Tensor  # (J, k), the value
    variance: Tensor  # (J, k), eigenvalues of S
    directions: Tensor  # (J, k, d), J^T H^T of each eigenvector
    stretch: Tensor  # (J, k), Rayleigh quotient of J along H^T of each

    def rows(self, index: Tensor) -> Twist:
        return Twist(*(field[index] for field in self))


def gaussian_twist(tangent: Tangent, linear: Linear, num_probes: int) -> Twist:
    """Return the twist of whitened residuals that are linear in x0, by num_probes products with J^T.

    Lanczos on M = H J H^T from the residual on: num_probes >= m gives S exactly; fewer leave out what the residual
    does not point to, which costs efficiency and not exactness, since any positive function is a valid twist.
    """
    residual = linear.value
    length = residual.norm(dim=1, keepdim=True)
    u = residual / length.clamp_min(1e-30)
    basis, slopes, directions, images = [], [], [], []
    for _ in range(min(num_probes, residual.shape[1])):
        basis.append(u)
        slopes.append(linear.adjoint(u))
        directions.append(tangent.pull(slopes[-1]))
        images.append(linear.apply(directions[-1]))
        U, u = torch.stack(basis, 2), images[-1]
        for _ in range(2):  # once more for rounding
            u = u - (U @ (U.mT @ u[..., None]))[..., 0]
        size = u.norm(dim=1, keepdim=True)
        lost = size <= 1e-6 * images[-1].norm(dim=1, keepdim=True)  # the space is exhausted
        u = torch.where(lost, 0.0, u / size.clamp_min(1e-30))
    T = torch.stack(basis, 1) @ torch.stack(images, 2)
    eigenvalues, vectors = torch.linalg.eigh(0.5 * (T + T.mT))  # networks are not quite symmetric
    eigenvalues = eigenvalues.clamp_min(0.0)
    along = vectors[:, 0, :] * length
    variance = 1 + tangent.sigma**2 * eigenvalues
    slopes = (vectors.mT @ torch.stack(slopes, 1)).square().sum(2)
    return Twist(
        log_psi=-0.5 * (along.square() / variance + variance.log()).sum(1),
        residual=along,
        variance=variance,
        directions=vectors.mT @ torch.stack(directions, 1),
        stretch=(eigenvalues / slopes.clamp_min(1e-30)).clamp(0.0, 1.0),
    )


def kernel(a: float, b: float) -> tuple[float, float]:
    """tau and beta of the reverse step from level a to level b."""
    tau = b * math.sqrt(a**2 - b**2) / a
    return tau, math.sqrt(a**2 - b**2) * (1 - b / a)


def reverse_step(tangent: Tangent, b: float, e: Tensor) -> Tensor:
    """x_b of the standard normals (or proposals) e (J, d), shape of x; all rows are at one level."""
    a = float(tangent.sigma)
    tau, beta = kernel(a, b)
    mean = tangent.denoised + (b / a) ** 2 * (tangent.x.flatten(1) - tangent.denoised)
    return (mean + tau * e + beta * tangent.pull(e)).reshape(tangent.x.shape)


def propose(twist: Twist, a: float, b: float, n: Tensor) -> tuple[Tensor, Tensor]:
    """e (J, d) drawn from its law given the data, N(-F^T S^-1 r, I - F^T S^-1 F), and log N(e; 0, I) - log q(e), (J,).

    F = H C (a^2 - b^2) / a^2 L^-T is how the residual's mean moves with e. Any F gives exact weights; L^-1 is taken
    at the stretch of each direction, and the shrunk variances are held between (b / a)^2 and 1, as in theory.
    """
    tau, beta = kernel(a, b)
    F = (a**2 - b**2) / (tau + beta * twist.stretch)[..., None] * twist.directions
    size, vectors = torch.linalg.eigh(F @ F.mT)
    size = size.clamp_min(0.0).sqrt()[..., None]
    axes = vectors.mT @ F / size.clamp_min(1e-30)  # orthonormal rows that span those of F
    half = size * vectors.mT / twist.variance.sqrt()[:, None, :]
    shrink, vectors = torch.linalg.eigh(torch.eye(half.shape[1]).to(half) - half @ half.mT)
    shrink = shrink.clamp((b / a) ** 2, 1.0)
    axes = vectors.mT @ axes
    narrow = (shrink.sqrt() - 1) * (axes @ n[..., None])[..., 0]
    shift = -(twist.residual / twist.variance)
    change = (shift[:, None] @ F + narrow[:, None] @ axes)[:, 0]
    log_ratio = 0.5 * shrink.log().sum(1) - (change * (n + 0.5 * change)).sum(1)
    return n + change, log_ratio
