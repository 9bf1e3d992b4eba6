"""Time and memory of a prior's network, as it comes and as `optimise` makes it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from invguide.api import load_prior
from invguide.bench.overhead import timed
from invguide.errors import InputError
from invguide.prior import Prior
from invguide.priors import from_network
from invguide.priors.networks.adm import ADM, Architecture
from invguide.rng import Noise
from invguide.system.devices import out_of_memory, resolve_device
from invguide.system.memory import peak_memory
from invguide.system.progress import progress_bar
from invguide.system.tables import Table

RANDOM = "adm-256"
SIGMA = 0.5
PLAIN: Mapping[str, Any] = {"dtype": "fp32", "channels_last": False}
MODES: dict[str, Mapping[str, Any]] = {
    "eager": PLAIN,
    "channels last": {"dtype": "fp32"},
    "bf16": {"dtype": "bf16", "channels_last": False},
    "bf16, channels last": {"dtype": "bf16"},
    "low memory": {**PLAIN, "memory": "low"},
    "bf16, channels last, low memory": {"dtype": "bf16", "memory": "low"},
    "compiled": {**PLAIN, "compile": True},
    "bf16, channels last, compiled": {"dtype": "bf16", "compile": True},
}


def priors(
    *,
    prior: str | Prior = "natural",
    size: int = 64,
    batches: Sequence[int] = (1, 4, 16),
    compile: bool | None = None,
    repeats: int = 5,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> Table:
    """Time the denoiser and its vector-Jacobian product, and count the memory of the latter.

    Args:
        prior: A prior or its name, or "adm-256": a network as large as those of guided-diffusion for 256 pixels (94
            million parameters), with random weights.
        size: Height and width of the images, where the prior takes any.
        batches: How many images at once.
        compile: Compiled networks too; by default on a GPU only. On a CPU that takes minutes, and gains little.
        repeats: Calls that are timed, after one that is not; the table has their medians.
        seed: Of the images.
        device: As for `invguide.solve`.
        progress: Show a bar.

    Returns:
        Milliseconds per image, the largest error of D against the plain network, and memory.
    """
    if size < 1 or repeats < 1 or not batches or min(batches) < 1:
        raise InputError(f"size={size}, batches={batches}, repeats={repeats}; expected at least 1")
    where = resolve_device(device)
    loaded = _random() if prior == RANDOM else load_prior(prior)
    loaded = loaded.to(where)
    shape = tuple(own or size for own in loaded.shape)
    wanted = where.type == "cuda" if compile is None else compile
    modes = {n: s for n, s in MODES.items() if wanted or not s.get("compile")}
    rows, found, exact = [], [], {}
    with progress_bar(len(modes) * len(batches), "priors", progress) as bar:
        for name, settings in modes.items():
            loaded.optimise(**settings)
            for batch in batches:
                noise = Noise(seed, tuple((0, i) for i in range(batch)), shape, device=where)
                x = noise() * (SIGMA**2 + (loaded.sigma_data or 1.0) ** 2) ** 0.5
                figures = _measure(loaded, x, repeats, where, exact)
                found.append({"mode": name, "batch": batch, **figures})
                rows.append((name, str(batch), *_cells(figures)))
                bar.update(1)
    loaded.optimise(**PLAIN)
    unit = "CPU" if where.type == "cpu" else "wall"
    parameters = sum(p.numel() for p in loaded.parameters()) / 1e6
    note = (
        f"{where.type.upper()}, {parameters:.1f} million parameters, images {' x '.join(map(str, shape))}, sigma "
        f"{SIGMA}. Milliseconds of {unit} time per image, medians of {repeats} calls. A vjp includes the denoiser. "
        "Memory: the most that tensors of a vjp hold, beyond the weights. Error: of D, relative to |D - x| of the "
        "plain network."
    )
    head = ("network", "batch", "denoise, ms", "vjp, ms", "vjp memory, MB", "error")
    return Table(head, tuple(rows), (note,), {"runs": found})


def _measure(
    prior: Prior, x: Tensor, repeats: int, device: torch.device, exact: dict[int, Tensor]
) -> dict[str, Any]:
    """Figures of one mode and batch; the first mode leaves its D in `exact`, by batch."""
    denoise, vjp = partial(_denoise, prior, x), partial(_vjp, prior, x)
    figures: dict[str, Any] = {}
    try:
        for name, call in (("denoise", denoise), ("vjp", vjp)):
            call()
            times = [timed(device, call) for _ in range(repeats)]
            figures[name] = 1000 * statistics.median(times) / len(x)
        figures["memory"] = peak_memory(vjp, device)
        denoised = denoise()
        reference = exact.setdefault(len(x), denoised)
        figures["error"] = float((denoised - reference).norm() / (reference - x).norm())
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return {}
    return figures


def _denoise(prior: Prior, x: Tensor) -> Tensor:
    with torch.no_grad():
        return prior.denoise(x, torch.tensor(SIGMA, device=x.device))


def _vjp(prior: Prior, x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    denoised = prior.denoise(leaf, torch.tensor(SIGMA, device=x.device))
    return torch.autograd.grad(denoised.square().sum(), leaf)[0]


def _cells(figures: dict[str, Any]) -> tuple[str, ...]:
    if not figures:
        return ("out of memory", "", "", "")
    return (
        f"{figures['denoise']:.1f}",
        f"{figures['vjp']:.1f}",
        f"{figures['memory'] / 1e6:.1f}",
        f"{figures['error']:.1e}",
    )


def _random() -> Prior:
    """As guided-diffusion's network for faces: 128 channels, one residual block per level, attention at 16 pixels."""
    architecture = Architecture(
        image_channels=3,
        output_channels=6,
        model_channels=128,
        channels=(128, 128, 256, 256, 512, 512),
        attention=(False, False, False, False, True, False),
        num_res_blocks=1,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        net = ADM(architecture, num_head_channels=64, qkv_order="new")
    return from_network(net, shape=(3, 256, 256))
