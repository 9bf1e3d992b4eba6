"""The conventions that a network may have been trained in, as data: to name one, to list them, to try one on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch

from invguide.priors.network import NetworkPrior
from invguide.priors.networks.adm import ADM, Attention
from invguide.priors.networks.clocks import LARGEST_USEFUL_SIGMA, SCHEDULES, VP, Clock
from invguide.priors.networks.labels import WithLabels

DATA_RANGES = ((-1.0, 1.0), (0.0, 1.0), (-2.0, 2.0), (-0.5, 0.5))  # the third: mean 0, deviation 1
FLOW_SCALES, STEP_SCALES = (1.0, 1000.0), (1.0, 1e-3)  # 1e-3: a time up to 1 in place of a step
OWN_TABLE = "alphas_bar"  # of a schedule that has no name


@dataclass(frozen=True)
class Convention:
    """The arguments of `from_network`, and the order of attention, which the files of ADM networks hide."""

    predicts: str
    schedule: str
    data_range: tuple[float, float]
    time_scale: float = 1.0
    reverse_time: bool = False
    qkv_order: str | None = None

    def arguments(self) -> dict[str, str]:
        """What is not as usual, as it is written in a call."""
        low, high = self.data_range
        optional = {
            "time_scale": (f"{self.time_scale:g}", self.time_scale != 1),
            "reverse_time": ("True", self.reverse_time),
            "qkv_order": (repr(self.qkv_order), self.qkv_order is not None),
        }
        always = {
            "predicts": repr(self.predicts),
            "schedule": self.schedule if self.schedule == OWN_TABLE else repr(self.schedule),
            "data_range": f"({low:g}, {high:g})",
        }
        return always | {name: text for name, (text, given) in optional.items() if given}

    def __str__(self) -> str:
        return ", ".join(f"{name}={text}" for name, text in self.arguments().items())

    def distance(self, other: Convention) -> int:
        """How many arguments differ, beside the meaning of the output."""
        pairs = zip(astuple(self)[1:], astuple(other)[1:], strict=True)
        return sum(mine != theirs for mine, theirs in pairs)

    def changes(self, wanted: Convention) -> str:
        """The arguments to pass in order to get from this convention to the wanted one."""
        mine, theirs = self.arguments(), wanted.arguments()
        usual = {"time_scale": "1", "reverse_time": "False"}
        new = {name: theirs.get(name, usual.get(name)) for name in {**theirs, **mine}}
        return ", ".join(f"{name}={text}" for name, text in new.items() if mine.get(name) != text)


def declared(prior: NetworkPrior) -> Convention:
    """The convention that a prior has."""
    low = -prior.shift / prior.scale
    orders = {layer.qkv_order for layer in _attention(prior)}
    return Convention(
        prior.predicts,
        _name(prior.schedule),
        (round(low, 6), round(low + 1 / prior.scale, 6)),
        prior.time_scale,
        prior.reverse_time,
        orders.pop() if orders else None,
    )


def possible(prior: NetworkPrior, own: Convention) -> Iterator[Convention]:
    """Every convention that could be this network's; `own` is the declared one."""
    orders = (None,) if own.qkv_order is None else ("legacy", "new")
    data_ranges = dict.fromkeys([own.data_range, *DATA_RANGES])
    for name, order in product(dict.fromkeys([own.schedule, *SCHEDULES]), orders):
        schedule = prior.schedule if name == own.schedule else _known(name, prior.sigma_data)
        scales: tuple[float, ...] = (1.0,)
        if schedule.end is not None:
            scales = STEP_SCALES if isinstance(schedule, VP) else FLOW_SCALES
        if name == own.schedule:
            scales = tuple(dict.fromkeys([*scales, own.time_scale]))
        directions = (False,) if schedule.end is None else (False, True)
        choices = product(schedule.predicts, data_ranges, scales, directions)
        for predicts, data_range, scale, reverse in choices:
            yield Convention(predicts, name, data_range, scale, reverse, order)


def number_of_classes(prior: NetworkPrior) -> int:
    """Of a class-conditional network; 0 of others."""
    for module in prior.modules():
        if isinstance(module, ADM):
            return module.architecture.num_classes or 0
        if isinstance(module, WithLabels):
            return module.classes
    return 0


@contextmanager
def tried_on(
    prior: NetworkPrior, own: Convention, convention: Convention
) -> Iterator[NetworkPrior]:
    """The prior of the same network, not copied, under another convention than its own."""
    variant: Any = copy.copy(prior)
    if convention.schedule != own.schedule:
        variant.schedule = _known(convention.schedule, prior.sigma_data)
        variant.sigma_min = variant.schedule.sigma_min
        variant.sigma_max = min(variant.schedule.sigma_max, LARGEST_USEFUL_SIGMA)
    low, high = convention.data_range
    variant.scale, variant.shift = 1 / (high - low), -low / (high - low)
    variant.predicts = convention.predicts
    variant.time_scale, variant.reverse_time = convention.time_scale, convention.reverse_time
    layers = _attention(prior)
    before = [layer.qkv_order for layer in layers]
    try:
        for layer in layers:
            layer.qkv_order = convention.qkv_order  # pyright: ignore[reportAttributeAccessIssue]
        yield variant
    finally:
        for layer, order in zip(layers, before, strict=True):
            layer.qkv_order = order


def _attention(prior: NetworkPrior) -> list[Attention]:
    return [layer for layer in prior.modules() if isinstance(layer, Attention)]


@lru_cache(maxsize=64)
def _known(name: str, sigma_data: float) -> Clock:
    return SCHEDULES[name](sigma_data)


def _name(schedule: Clock) -> str:
    """The name of a schedule, also where it was given as a table."""
    for name in SCHEDULES:
        known = _known(name, 1.0)
        if type(known) is not type(schedule):
            continue
        if not (isinstance(known, VP) and isinstance(schedule, VP)):
            return name
        one, other = known.log_sigmas, schedule.log_sigmas
        if one.shape == other.shape and torch.allclose(one, other, atol=1e-4):
            return name
    return OWN_TABLE
