"""The front door: strings, callables and foreign objects become ours here, and nowhere else."""

# Longer than 350 lines: the front door, whose docstrings are the manual.

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from invguide import driver
from invguide.arguments.checks import check, checked, shown
from invguide.arguments.rules import Array, Count, Shape
from invguide.engine.probe import probe
from invguide.errors import InputError, suggest
from invguide.likelihood import Likelihood
from invguide.noise import NoiseModel
from invguide.policy import choose
from invguide.prior import Prior
from invguide.problem.problem import Problem
from invguide.result import Result
from invguide.reward import Reward, as_reward, try_reward
from invguide.rng import Noise
from invguide.solver import EnsembleSolver, Solver
from invguide.system.surroundings import outside_inference, thaw


@checked
def load_prior(
    where: Any,
    *,
    weights: str | Path | None = None,
    entry: str | None = None,
    check: bool | Tensor = True,
    **settings: Any,
) -> Prior:
    """Return a prior from whatever holds a pretrained network; `invguide priors` lists what is recognised.

    Args:
        where: One of
            the name of an embedded prior ("natural", "natural-tiny");
            a weights file (.pt, .pth, .ckpt, .safetensors, NVIDIA's .pkl) of a recognised family: no code of it is run;
            a folder saved by diffusers, or the id of one on the Hugging Face hub ("google/ddpm-celebahq-256"); with
            an autoencoder in it, samples and measurements are images (`invguide.priors.LatentPrior`);
            a pipeline object of diffusers, whose network, scheduler and autoencoder are taken;
            a deepinv denoiser;
            a network, with predicts= and schedule= (see `invguide.priors.from_network`);
            a Prior, which is returned as it is.
        weights: A file to fill that network with; every weight must be there and fit.
        entry: Which part of a file, where it holds several networks ("ema", "model", ...); by default the
            averaged one.
        check: Whether a network of pictures is tried on a photograph, under the declared convention and others
            (`invguide.priors.doctor.examine`); or the clean signals to try it on, (N, *shape) in data units.
        settings: What the file or network does not tell: preset=, num_heads=, num_head_channels= and qkv_order= of
            guided-diffusion networks; precondition= of EDM's; autoencoder= of EDM2's latent ones; predicts=, schedule=,
            shape=, data_range=, ... of `from_network`.

    Raises:
        InputError: Unknown name (the nearest one is suggested), or something that has to be told is not, or it is
            told wrongly (the error names what is right).
        CheckpointError: The file is damaged, unsafe to read, or does not fit: no weight is left at random.
        MissingPackageError: diffusers is needed and not installed.
    """
    from invguide.priors.checkpoints.deepinv import is_deepinv
    from invguide.priors.checkpoints.loading import load
    from invguide.priors.doctor.examine import check_loaded
    from invguide.priors.network import NetworkPrior
    from invguide.priors.networks.unet import UNet

    prior = load(where, weights=weights, entry=entry, **settings)
    if check is False or isinstance(where, Prior) or not isinstance(prior, NetworkPrior):
        return prior
    if is_deepinv(where) and next(prior.parameters(), None) is None:
        return prior  # total variation and the like, which nobody has trained
    if isinstance(where, nn.Module) or not isinstance(prior.net, UNet):  # files of ours tell all
        check_loaded(prior, check if isinstance(check, Tensor) else None)
    return prior


def make_solver(solver: str | Solver[Any] | type[Solver[Any]], **settings: Any) -> Solver[Any]:
    """Return a solver by name ("dps", ... in any spelling) or class, with its defaults or these settings."""
    if isinstance(solver, Solver):
        return solver
    if isinstance(solver, type) and issubclass(solver, Solver):
        return solver(**settings)
    if not isinstance(solver, str):
        raise InputError(
            f"the solver is {shown(solver)}; expected a solver such as DPS(num_steps=50), its name, or 'auto'"
        )
    import invguide.solvers  # noqa: F401  fills the registry

    names = {_plain(name): kind for name, kind in Solver.registry.items()}
    if _plain(solver) not in names:
        raise InputError(
            f"unknown solver {solver!r}; {suggest(solver, [*Solver.registry, 'auto'])}"
        )
    return names[_plain(solver)](**settings)


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def choose_solver(problem: Problem, num_samples: int | None = None) -> Solver[Any]:
    """Return what `solver="auto"` takes: see `invguide.policy.choose`, which also tells why."""
    return choose(problem, num_samples).solver


def _solver_for(
    problem: Problem, solver: str | Solver[Any] | type[Solver[Any]], num_samples: int | None
) -> tuple[Solver[Any], str]:
    """Resolve "auto" and names, and why; an ensemble method not given as an object takes num_samples as its size."""
    if isinstance(solver, Solver):
        return solver, ""
    auto = isinstance(solver, str) and solver.lower() == "auto"
    chosen, reason = choose(problem, num_samples) if auto else (make_solver(solver), "")
    if isinstance(chosen, EnsembleSolver) and num_samples is not None:
        chosen = replace(chosen, ensemble_size=num_samples)
    return chosen, reason


@outside_inference
@partial(checked, also=driver.run)
def solve(
    y: Tensor | np.ndarray | Any,
    operator: Any,
    prior: Prior | str | Any,
    *,
    sigma_y: Tensor | float | None = None,
    noise: NoiseModel | Callable[..., Tensor] | None = None,
    mask: Tensor | np.ndarray | None = None,
    reward: Reward | Callable[[Tensor], Tensor] | None = None,
    solver: Solver[Any] | type[Solver[Any]] | str = "auto",
    num_samples: Count | None = None,
    shape: Shape | None = None,
    condition: Mapping[str, Any] | None = None,
    init: Tensor | np.ndarray | None = None,
    init_noise: float | None = None,
    truth: Tensor | np.ndarray | None = None,
    **run: Any,
) -> Result:
    """Draw samples of x given a measurement y = operator(x) + noise.

    Args:
        y: Measurements, batched: (B, *y_shape). A tensor, an array of any byte order or strides, or one PIL picture.
        operator: An Operator, a torch callable or module, a deepinv Physics (its noise level is read), or a numpy
            function (a black box). Works in data units, batch first.
        prior: A prior, or anything that `load_prior` takes.
        sigma_y: Gaussian noise standard deviation in measurement units: a number or per element.
        noise: Another noise law, or a callable log density, in place of sigma_y.
        mask: Which values of y are known, 1 or True: one measurement's shape, or y's. None: all, but for what a numpy
            masked array leaves out.
        reward: Added to log p(y | x): samples are those of p(x | y) exp(reward). As for `guide`.
        solver: A solver, its name or class, or "auto": exact methods where they apply, else the best measured one for
            this operator and number of samples (`invguide.policy`); the reason is `result.manifest["auto"]`.
        num_samples: Samples per measurement, 1 by default; of an ensemble method, the size of its ensemble.
        shape: Shape of one x, where neither prior nor operator knows it.
        condition: Keywords of a conditional prior, such as {"label": 3}: numbers, lists, arrays or tensors, one row per
            measurement or one for all.
        init: Clean signals to start from, (B, *shape), data units: a warm start, or a picture to vary (SDEdit: Meng et
            al. 2021, arXiv 2108.01073).
        init_noise: Standard deviation of the noise added to them, data units; with `init` always.
        truth: The clean signals (B, *shape), if known; only adds `metrics` to the result.
        run: Further arguments of `invguide.driver.run`: seed, batch_size, device, checkpoint, ...

    Returns:
        Result: samples (B, num_samples, *shape) in data units, and their summary.

    Raises:
        InputError: Whatever is wrong with the arguments, before the first network call.
        DivergenceError: A sample diverged.
    """
    chosen, problem, reason = prepare(
        y,
        operator,
        prior,
        sigma_y=sigma_y,
        noise=noise,
        mask=mask,
        reward=reward,
        solver=solver,
        num_samples=num_samples,
        shape=shape,
        condition=condition,
        init=init,
        init_noise=init_noise,
    )
    if truth is not None:
        from invguide.diagnostics.metrics import check_truth

        assert isinstance(truth, Tensor)  # as its annotation is converted
        truth = check_truth(truth, (problem.num_measurements, *problem.data_shape))
    result = run_prepared(chosen, problem, reason, num_samples, **run)
    if truth is not None:
        from invguide.diagnostics.metrics import compare

        result.metrics = compare(result, truth)
    return result


@outside_inference
@checked
def prepare(
    y: Tensor | np.ndarray | Any,
    operator: Any,
    prior: Prior | str | Any,
    *,
    sigma_y: Tensor | float | None = None,
    noise: NoiseModel | Callable[..., Tensor] | None = None,
    mask: Tensor | np.ndarray | None = None,
    reward: Reward | Callable[[Tensor], Tensor] | None = None,
    solver: Solver[Any] | type[Solver[Any]] | str = "auto",
    num_samples: Count | None = None,
    shape: Shape | None = None,
    condition: Mapping[str, Any] | None = None,
    init: Tensor | np.ndarray | None = None,
    init_noise: float | None = None,
) -> tuple[Solver[Any], Problem, str]:
    """Return what `solve` with these arguments hands to the driver, checked, and why "auto" took this solver."""
    from invguide.adapters.deepinv_stack import DeepinvStack
    from invguide.adapters.operators import as_operator

    prior = load_prior(prior)
    operator = as_operator(operator)
    thaw(operator)
    if noise is not None and sigma_y is not None:
        raise InputError("both sigma_y and noise are given; give one")
    law = sigma_y if noise is None else noise
    if law is None:
        law = getattr(operator, "noise", None)
    if law is None:
        raise InputError(
            "the noise level is unknown; pass sigma_y=..., in the units of y, or noise=..."
        )
    if isinstance(operator, DeepinvStack) and not isinstance(y, (Tensor, np.ndarray)):
        y = operator.join(y)
    y = check("solve", "y", y, Array(batch=True))
    likelihood = Likelihood(operator, y, law, mask)
    problem = Problem(
        prior,
        likelihood,
        None if reward is None else as_reward(reward),
        shape=shape,
        condition=condition,
        init=init,
        init_noise=init_noise,
    )
    thaw(prior)
    probe(problem)
    problem = _with_tried_reward(problem)
    chosen, reason = _solver_for(problem, solver, num_samples)
    return chosen, problem, reason


def run_prepared(
    solver: Solver[Any], problem: Problem, reason: str, num_samples: int | None, **run: Any
) -> Result:
    """Return the result of what `prepare` returned, with all that `solve` adds to that of the driver."""
    result = driver.run(solver, problem, num_samples, **run)
    if reason:
        result.manifest["auto"] = reason
    if problem.likelihood is not None:
        result.residual = _residual(problem.likelihood, result)
        result.reward = _reward_of(problem, result)
    return result


@outside_inference
@partial(checked, also=driver.run)
def guide(
    prior: Prior | str | Any,
    reward: Reward | Callable[[Tensor], Tensor],
    *,
    solver: Solver[Any] | type[Solver[Any]] | str = "auto",
    num_samples: Count | None = None,
    shape: Shape | None = None,
    condition: Mapping[str, Any] | None = None,
    init: Tensor | np.ndarray | None = None,
    init_noise: float | None = None,
    **run: Any,
) -> Result:
    """Draw samples of the prior tilted by exp(reward).

    Args:
        prior: A prior, or anything that `load_prior` takes.
        reward: A Reward, a BlackBox, or a callable (N, *shape) -> (N,) on torch tensors or numpy arrays, in data
            units; higher is better.
        solver: A solver, its name, or "auto".
        num_samples, shape, condition, init, init_noise, run: As for `solve`.
    """
    prior = load_prior(prior)
    problem = Problem(
        prior,
        reward=as_reward(reward),
        shape=shape,
        condition=condition,
        init=init,
        init_noise=init_noise,
    )
    problem = _with_tried_reward(problem)
    chosen, reason = _solver_for(problem, solver, num_samples)
    return run_prepared(chosen, problem, reason, num_samples, **run)


def _with_tried_reward(problem: Problem) -> Problem:
    """The problem with a reward that knows whether it has a gradient: a callable does after its first call only."""
    reward, prior = problem.reward, problem.prior
    if reward is None or not reward.differentiable:
        return problem
    with torch.no_grad():
        signal = Noise(0, ((0, 0),), problem.shape)("probe") * (prior.sigma_data or 1.0)
        return problem.with_reward(try_reward(reward, prior.to_data(signal)))


def _reward_of(problem: Problem, result: Result) -> Tensor | None:
    """The reward of every sample, (B, num_samples); of one that is dear, from what the run has noted already."""
    reward, likelihood = problem.reward, problem.likelihood
    if reward is None or likelihood is None:
        return None
    if not reward.differentiable and problem.gaussian:
        size = likelihood.sizes.to(result.chi2)[:, None]
        return result.log_prob + 0.5 * size * result.chi2  # log p(y | x) = -size chi2 / 2
    found = torch.full_like(result.log_prob, float("nan"))
    with torch.no_grad():
        for b, done in enumerate(result.finished):
            if bool(done.any()):
                samples = result.samples[b, done].to(problem.like.device)
                found[b, done] = reward(samples).to(found)
    return found


def _residual(likelihood: Likelihood, result: Result) -> Tensor | None:
    """y - A(mean) on the CPU, in the dtype of the samples; None for black boxes, whose calls may be dear."""
    if not likelihood.operator.differentiable:
        return None
    with torch.no_grad():
        return likelihood.to("cpu", result.samples.dtype).residual(result.mean)
