"""A word, or a question, before a run of more than an hour."""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

import torch

from invguide.errors import InputError
from invguide.prior import Prior
from invguide.priors.wrappers.latent import LatentPrior
from invguide.priors.wrappers.tiled import Tiled
from invguide.restoration.settings import Job
from invguide.solver import Solver
from invguide.system.devices import resolve_devices

HOUR = 3600  # seconds


LONG_WORK = 2**26  # pixels times steps times samples, below which no run here takes an hour


def announce(job: Job, prior: Prior, solver: Solver[Any], shape: tuple[int, ...]) -> None:
    """Say, or ask, before a run of more than an hour; told from one call of the network on a small picture."""
    pixels = math.prod(shape[1:])
    work = pixels * solver.num_steps * job.settings.samples
    if work < LONG_WORK or isinstance(prior, LatentPrior):
        return
    device = resolve_devices(job.settings.device)[0]
    tile = prior.tile[0] if isinstance(prior, Tiled) else max(128, prior.min_size)
    sizes = [own or tile for own in prior.shape[1:]]
    x = torch.zeros(1, shape[0], *sizes, device=device)
    condition, seconds = {k: v.to(device) for k, v in job.condition.items()}, math.inf
    with torch.no_grad():
        for _ in range(2):  # the first is slower
            start = time.perf_counter()
            prior.to(device).denoise(x, 1.0, **condition)
            seconds = min(seconds, (time.perf_counter() - start) * work / math.prod(sizes))
    if seconds < HOUR:
        return
    text = (
        f"about {seconds / HOUR:.0f} h for {pixels / 1e6:.0f} million pixels ({shape[2]} x {shape[1]}), "
        f"{solver.num_steps} steps; `invguide plan` tells more"
    )
    if job.confirm is None:
        warnings.warn(f"this takes {text}")
    elif not job.confirm(f"This takes {text}. Go on?"):
        raise InputError(f"not begun: it takes {text}")
