"""Exact gradients through a deterministic roll-out of the probability flow, in memory constant in its steps.

Steps are linear in x and in denoised signals D_i = D(X_i; s_i), see `tableaus`, so that the adjoint is the same few
lines for all methods: with bars for gradients, Dbar_j = q_j xbar', and from the last stage to the first

    Xbar_i = J_i^T Dbar_i,    xbar += p_i Xbar_i,    Dbar_j += q_ij Xbar_i.

For Runge-Kutta tableaus this is the partitioned (symplectic) adjoint with its special rule for b_i = 0 (Matsubara,
Miyatake, Yaguchi 2021, arXiv 2102.09750, eq. 7; Pan et al. 2023, arXiv 2312.12030, alg. 1), rearranged so that
nothing is divided by b_i. It is the derivative of the discrete solver, not of the differential equation: exact for any
number of steps. Only one network graph is alive at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from invguide.adjoint.faults import _check_deterministic, _check_slope, _check_states, check_loss
from invguide.arguments.checks import checked
from invguide.arguments.rules import Count
from invguide.errors import InputError, ShapeError
from invguide.numerics.tableaus import Step, make_steps
from invguide.prior import Prior
from invguide.problem.problem import Problem, TargetGradient

# ---- forwards and backwards

Denoiser = Callable[[Tensor, float], Tensor]


class Kept(NamedTuple):
    """What the way back needs of a step; states are small beside a network graph."""

    x: Tensor  # at its start
    denoised: list[Tensor]  # D_i of all its stages but the last
    samples: list[Tensor]  # a few values of every D_i, to know it again


def _run(
    denoise: Denoiser, x: Tensor, previous: Tensor | None, steps: Sequence[Step]
) -> tuple[Tensor, Tensor | None, list[Kept]]:
    memory: list[Kept] = []
    for step in steps:
        denoised: list[Tensor] = []
        for level, point in zip(step.levels, step.points, strict=True):
            denoised.append(denoise(point(x, denoised), level))
        memory.append(Kept(x, denoised[:-1], [_sample(d) for d in denoised]))
        x, previous = step.end(x, denoised, previous), denoised[0]
    return x, previous, memory


class _Rollout(torch.autograd.Function):
    """The end of a roll-out, as a function of its start x and of `wrt`, which the denoiser holds."""

    @staticmethod
    def forward(
        ctx: Any,
        denoise: Denoiser,
        steps: list[Step],
        every: int,
        wrt: Sequence[Tensor],
        x: Tensor,
        *_: Tensor,  # the tensors of wrt again, so that autograd sees them
    ) -> Tensor:
        ctx.denoise, ctx.steps, ctx.every, ctx.wrt = denoise, steps, every, wrt
        ctx.memory = []
        previous = None
        for start in range(0, len(steps), every):
            begin = x, previous
            x, previous, kept = _run(denoise, x, previous, steps[start : start + every])
            ctx.memory.append(kept if every == 1 else begin)
        # What is called again has to be called in the same precision.
        kind = x.device.type
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        totals = [torch.zeros_like(t) for t in ctx.wrt]
        carried = None
        kind, dtype, enabled = ctx.autocast
        with torch.autocast(kind, dtype, enabled):
            for start in reversed(range(0, len(ctx.steps), ctx.every)):
                steps = ctx.steps[start : start + ctx.every]
                kept = ctx.memory[start // ctx.every]
                if ctx.every > 1:
                    with torch.no_grad():
                        kept = _run(ctx.denoise, kept[0], kept[1], steps)[2]
                for step, known in zip(reversed(steps), reversed(kept), strict=True):
                    bar, carried = _pull_back(
                        ctx.denoise, step, known, bar, carried, ctx.wrt, totals
                    )
        return None, None, None, None, bar, *totals


def _pull_back(
    denoise: Denoiser,
    step: Step,
    known: Kept,
    bar: Tensor,
    carried: Tensor | None,
    wrt: Sequence[Tensor],
    totals: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Carry the gradient of one step's end (`bar`) and of its first D (`carried`) back to its start and to D_prev."""
    bars = [q * bar for q in step.end.q]
    if carried is not None:
        bars[0] = bars[0] + carried
    x_bar = step.end.p * bar
    for i in reversed(range(len(step.levels))):
        row = step.points[i]
        with torch.enable_grad():
            point = row(known.x, known.denoised[:i]).detach().requires_grad_()
            again = denoise(point, step.levels[i])
        _check_deterministic(_sample(again.detach()), known.samples[i])
        if not again.requires_grad:
            continue  # a prior that does not look at x
        found = torch.autograd.grad(again, (point, *wrt), bars[i], allow_unused=True)
        for total, part in zip(totals, found[1:], strict=True):
            if part is not None:
                total += part
        if (point_bar := found[0]) is not None:
            x_bar = x_bar + row.p * point_bar
            for j, q in enumerate(row.q):
                bars[j] = bars[j] + q * point_bar
    return x_bar, step.end.r * bar


def _sample(denoised: Tensor) -> Tensor:
    """About 64 values of each row, (B, m)."""
    rows = denoised.flatten(1)
    return rows[:, :: max(1, rows.shape[1] // 64)].clone()


# ---- the public face


@checked
def rollout(
    prior: Prior,
    x: Tensor,
    sigmas: Sequence[float] | Tensor,
    method: str = "euler",
    *,
    condition: dict[str, Tensor] | None = None,
    wrt: Sequence[Tensor] = (),
    checkpoint_every: Count = 1,
) -> Tensor:
    """Follow the probability flow from x at sigmas[0] to sigmas[-1]; backward is exact and light on memory.

    Args:
        prior: The prior.
        x: States at the first level, (B, *shape), normalised units.
        sigmas: n + 1 levels that decrease strictly; the last may be 0.
        method: One of "euler" (which is "ddim"), "midpoint", "heun", "ralston", "rk4", "dpm++2s", "dpm++2m".
        condition: Keywords of a conditional prior, one row per sample.
        wrt: Tensors besides x to take gradients of: conditions, or parameters of the network that require them.
        checkpoint_every: Steps between the states that are kept for backward. 1 keeps all; m keeps one in m, and calls
            the network once more for each stage.

    Returns:
        States at the last level, (B, *shape), differentiable once in x and `wrt`.

    Raises:
        InputError: No roll-out, an unknown method, or (in backward) a denoiser that is not deterministic.
    """
    _check_states(x)
    levels = torch.as_tensor(sigmas, dtype=torch.float64)
    if levels.ndim != 1:
        raise ShapeError(
            f"sigmas has shape {tuple(levels.shape)}; expected n + 1 levels, (n + 1,)"
        )
    steps = make_steps(levels.tolist(), method)
    for tensor in wrt:
        if not tensor.requires_grad:
            raise InputError(
                f"a tensor of wrt, shape {tuple(tensor.shape)}, does not require gradients; call requires_grad_()"
            )
    keywords = condition or {}

    def denoise(point: Tensor, level: float) -> Tensor:
        return prior.denoise(point, point.new_tensor(level), **keywords)

    return _apply(denoise, steps, checkpoint_every, wrt, x)


def rollout_in(
    problem: Problem, x: Tensor, sigmas: Sequence[float], method: str = "euler"
) -> Tensor:
    """`rollout` for solvers: with the prior and the conditions of a problem, whose counters go on."""
    return _apply(_counted(problem, []), make_steps(sigmas, method), 1, (), x)


def guide_through(
    problem: Problem, x: Tensor, sigmas: Sequence[float], method: str = "euler"
) -> tuple[Tensor, TargetGradient]:
    """Return D(x; sigmas[0]), and `problem.guide` with the end of a roll-out in the place of D.

    A single step to 0 is the denoiser itself. Else the network is called twice for each stage, once of them for a vjp.
    """
    if len(sigmas) == 2 and sigmas[1] == 0:
        guidance = problem.guide(x, sigmas[0])
        return guidance.denoised, guidance
    seen: list[Tensor] = []
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        end = _apply(_counted(problem, seen), make_steps(sigmas, method), 1, (), x)
    log_prob, chi2, slope = problem.gradient(end)
    (gradient,) = torch.autograd.grad(end, x, slope)
    return seen[0], TargetGradient(end.detach(), log_prob, chi2, slope, gradient)


def _counted(problem: Problem, seen: list[Tensor]) -> Denoiser:
    """Return the problem's denoiser; it puts its first result into `seen`."""

    def denoise(point: Tensor, level: float) -> Tensor:
        if torch.is_grad_enabled():  # backwards: its vjp follows
            problem.counters.vjp += len(point)
        denoised = problem.denoise(point, level)
        if not seen:
            seen.append(denoised)
        return denoised

    return denoise


def _apply(
    denoise: Denoiser, steps: list[Step], every: int, wrt: Sequence[Tensor], x: Tensor
) -> Tensor:
    end = _Rollout.apply(denoise, steps, every, tuple(wrt), x, *wrt)
    assert isinstance(end, Tensor)
    return end


@overload
def rollout_gradient(
    prior: Prior,
    x: Tensor,
    sigmas: Sequence[float] | Tensor,
    loss: Callable[[Tensor], Tensor],
    method: str = "euler",
    *,
    condition: dict[str, Tensor] | None = None,
    checkpoint_every: int = 1,
) -> tuple[Tensor, Tensor]: ...
@overload
def rollout_gradient(
    prior: Prior,
    x: Tensor,
    sigmas: Sequence[float] | Tensor,
    loss: Callable[[Tensor], Tensor],
    method: str = "euler",
    *,
    condition: dict[str, Tensor] | None = None,
    wrt: Sequence[Tensor],
    checkpoint_every: int = 1,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]: ...
@checked
def rollout_gradient(
    prior: Prior,
    x: Tensor,
    sigmas: Sequence[float] | Tensor,
    loss: Callable[[Tensor], Tensor],
    method: str = "euler",
    *,
    condition: dict[str, Tensor] | None = None,
    wrt: Sequence[Tensor] = (),
    checkpoint_every: int = 1,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Value and gradient in x of any function of the end of a roll-out.

    Args:
        loss: The function, (B, *shape), normalised units -> (B,); each row of its own sample only.
        prior, x, sigmas, method, condition, wrt, checkpoint_every: As for `rollout`.

    Returns:
        value (B,) and gradient (B, *shape); where `wrt` is given also its gradients, summed over the samples.

    Raises:
        ShapeError: The loss does not return one value per sample.
        InputError: A loss that is complex, not finite, constant, detached from its input, or changes it in place;
            and what `rollout` raises.

    Example:
        >>> from invguide.priors import Gaussian
        >>> prior = Gaussian(torch.zeros(2), torch.eye(2))
        >>> value, gradient = rollout_gradient(prior, torch.ones(1, 2), [1.0, 0.0], lambda x: x.sum(1))
        >>> value, gradient
        (tensor([1.]), tensor([[0.5000, 0.5000]]))
    """
    _check_states(x)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        end = rollout(
            prior,
            x,
            sigmas,
            method,
            condition=condition,
            wrt=wrt,
            checkpoint_every=checkpoint_every,
        )
        value = check_loss(loss, end)
        slope, gradient, *others = torch.autograd.grad(
            value.sum(), (end, x, *wrt), allow_unused=True
        )
    _check_slope(slope)
    value = value.detach()
    return (value, gradient, tuple(others)) if wrt else (value, gradient)
