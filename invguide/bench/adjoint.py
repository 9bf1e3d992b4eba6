"""What an exact gradient through a roll-out costs: memory, time and error, against the usual ways to get one."""

from __future__ import annotations

import copy
import importlib.util
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from invguide.adjoint.symplectic import rollout_gradient
from invguide.api import load_prior
from invguide.bench.overhead import timed
from invguide.errors import InputError, suggest
from invguide.numerics.tableaus import METHODS, make_steps
from invguide.prior import Prior
from invguide.priors import from_network
from invguide.priors.networks.unet import UNet
from invguide.schedule import make_sigmas
from invguide.system.devices import resolve_device
from invguide.system.memory import peak_memory
from invguide.system.progress import progress_bar
from invguide.system.tables import Table

Gradient = Callable[[Prior, Tensor, list[float], str], Tensor]

# Those with the same tableau there; its "rk4" is another method of fourth order.
TORCHDIFFEQ = {"euler": "euler", "midpoint": "midpoint", "heun": "heun2"}
CONTINUOUS = "continuous adjoint"


def loss(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1)


def ours(prior: Prior, x: Tensor, sigmas: list[float], method: str) -> Tensor:
    return rollout_gradient(prior, x, sigmas, loss, method)[1]


def back_propagate(
    prior: Prior, x: Tensor, sigmas: list[float], method: str, again: bool = False
) -> Tensor:
    """Differentiate all steps in one graph; `again`: of every network call only the input is kept."""

    def denoise(point: Tensor, level: float) -> Tensor:
        sigma = point.new_tensor(level)
        if again:
            return checkpoint(prior.denoise, point, sigma, use_reentrant=False)
        return prior.denoise(point, sigma)

    start = point = x.clone().requires_grad_()
    previous = None
    for step in make_steps(sigmas, method):
        denoised: list[Tensor] = []
        for level, row in zip(step.levels, step.points, strict=True):
            denoised.append(denoise(row(point, denoised), level))
        point, previous = step.end(point, denoised, previous), denoised[0]
    return torch.autograd.grad(loss(point).sum(), start)[0]


def continuous_adjoint(prior: Prior, x: Tensor, sigmas: list[float], method: str) -> Tensor:
    """Integrate the adjoint differential equation, and the flow once more, backwards from its end."""
    from torchdiffeq import odeint_adjoint

    levels = torch.tensor(sigmas, dtype=x.dtype, device=x.device)

    def grid(_: object, __: object, t: Tensor) -> Tensor:
        """The levels, in the direction and with the sign of time that are asked for."""
        return t[0].sign() * (levels if t[0].abs() > t[-1].abs() else levels.flip(0))

    start = x.clone().requires_grad_()
    flow = odeint_adjoint(
        lambda sigma, point: (point - prior.denoise(point, sigma)) / sigma,
        start,
        levels[[0, -1]],
        method=TORCHDIFFEQ[method],
        options={"grid_constructor": grid},
        adjoint_options={"grid_constructor": grid},
        adjoint_params=(),
    )
    assert isinstance(flow, Tensor)
    return torch.autograd.grad(loss(flow[-1]).sum(), start)[0]


WAYS: dict[str, Gradient] = {
    "ours": ours,
    "full back-propagation": back_propagate,
    "checkpointed": partial(back_propagate, again=True),
    CONTINUOUS: continuous_adjoint,
}


def adjoint(
    *,
    prior: str | Prior | None = None,
    size: int = 32,
    width: int = 128,
    methods: Sequence[str] = METHODS,
    steps: Sequence[int] = (2, 8, 32),
    repeats: int = 1,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> Table:
    """Measure gradients of |x0|^2 through roll-outs from noise 5 to 0.05, in float32.

    Args:
        prior: A prior or its name, for images; by default a U-Net with random weights.
        size: Pixels per side.
        width: Channels of that U-Net at its finest level.
        methods: Of `invguide.adjoint.symplectic`.
        steps: Numbers of steps n, growing.
        repeats: Runs that are timed, in turns; medians are taken.
        seed: Of image and random weights.
        device: As for `invguide.solve`.
        progress: Show a bar.

    Returns:
        Per method and way: peak of memory and its growth, time over that of full back-propagation, and the relative
        error against full back-propagation in float64.
    """
    for method in methods:
        if method not in METHODS:
            raise InputError(f"unknown method {method!r}; {suggest(method, METHODS)}")
    if repeats < 1 or not steps or min(steps) < 1:
        raise InputError(f"repeats={repeats}, steps={tuple(steps)}; expected at least 1 of each")
    where = resolve_device(device)
    loaded = (random_prior(width, seed) if prior is None else load_prior(prior)).to(where)
    precise = copy.deepcopy(loaded).double()
    source = torch.Generator().manual_seed(seed)
    x = (5 * torch.randn(1, 3, size, size, generator=source)).to(where)
    found: dict[str, dict[str, list[float]]] = {}
    installed = importlib.util.find_spec("torchdiffeq") is not None
    with progress_bar(len(methods) * len(steps), "gradients through roll-outs", progress) as bar:
        for method in methods:
            ways = [
                way for way in WAYS if way != CONTINUOUS or (installed and method in TORCHDIFFEQ)
            ]
            for n in steps:
                sigmas = make_sigmas("karras", n + 1, 0.05, 5.0).tolist()[:-1]
                exact = back_propagate(precise, x.double(), sigmas, method)
                calls = {way: partial(WAYS[way], loaded, x, sigmas, method) for way in ways}
                times: dict[str, list[float]] = {way: [] for way in ways}
                for _ in range(repeats):
                    for way, call in calls.items():
                        times[way].append(timed(where, call))
                for way, call in calls.items():
                    cell = found.setdefault(
                        f"{method}: {way}", {"MiB": [], "seconds": [], "error": []}
                    )
                    cell["MiB"].append(peak_memory(call, where) / 2**20)
                    cell["seconds"].append(statistics.median(times[way]))
                    cell["error"].append(float((call().double() - exact).norm() / exact.norm()))
                bar.update(1)
    return _table(found, methods, steps, size, loaded, installed, x, where)


def random_prior(width: int, seed: int) -> Prior:
    """A U-Net as wide as published ones, with random weights: its gradients mean nothing, but cost what theirs do."""
    with torch.random.fork_rng(devices=[]):
        net = UNet(channels=(width, 2 * width, 2 * width))
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in net.parameters():
            fan_in = weight[0].numel() if weight.ndim > 1 else 1
            weight.normal_(0.0, 0.5 * fan_in**-0.5 if weight.ndim > 1 else 0.0, generator=source)
    return from_network(net, predicts="edm", schedule="edm", multiple=net.multiple)


def _table(
    found: dict[str, dict[str, list[float]]],
    methods: Sequence[str],
    steps: Sequence[int],
    size: int,
    prior: Prior,
    installed: bool,
    x: Tensor,
    where: torch.device,
) -> Table:
    rows: list[tuple[str, ...]] = []
    for name, cell in found.items():
        full = found[f"{name.split(':')[0]}: full back-propagation"]["seconds"]
        rows.append(
            (
                name,
                " / ".join(f"{value:.1f}" for value in cell["MiB"]),
                f"{cell['MiB'][-1] / cell['MiB'][0]:.2f}",
                f"{cell['seconds'][-1]:.2f}",
                f"{cell['seconds'][-1] / full[-1]:.2f}",
                " / ".join(f"{value:.0e}" for value in cell["error"]),
            )
        )
    few, many = steps[0], steps[-1]
    graph = peak_memory(partial(back_propagate, prior, x, [1.0, 0.0], "euler"), where)
    unit = "CPU seconds" if where.type == "cpu" else "seconds"
    peak = "of tensors, counted" if where.type == "cpu" else "of the allocator"
    notes = [
        f"Gradient of |x0|^2 through n = {', '.join(map(str, steps))} steps from noise 5 to 0.05, one image of "
        f"{size} x {size}, float32. Peak: {peak}; growth: n = {many} over n = {few}; {unit} and their ratio to full "
        f"back-propagation: n = {many}. Error: relative, against full back-propagation in float64.",
        f"Ours keeps one network graph and, per step, as many images as the method has stages; here a graph is as "
        f"large as {graph / x.nbytes:.0f} images. The goals are a growth of at most 1.1 and a time of at most 1.7.",
    ]
    if not installed:
        notes.append("The continuous adjoint is left out: pip install torchdiffeq")
    head = ("method: gradient by", "peak, MiB", "growth", unit, "over full", "error")
    return Table(head, tuple(rows), tuple(notes), found)
