"""What decides the result of a run, in words and fingerprints: a checkpoint goes on only where all of it agrees."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from invguide.errors import InputError, suggest
from invguide.prior import Prior
from invguide.problem.problem import Problem
from invguide.solver import Solver
from invguide.system.content_hash import Content, changed_parts, content_of

# Parts that hold code or data of the user, which somebody may vouch for.
FOLLOWED = ("solver", "prior", "condition", "operator", "noise", "y", "reward")
SHOWN = 3  # changed parts that a message names


@functools.cache
def versions() -> Mapping[str, str]:
    """Of Python and the packages that matter; looking them up takes as long as a call of a small network."""
    from importlib import metadata

    found = {"python": platform.python_version()}
    for name in ("invguide", "torch", "deepinv", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def fingerprint(*tensors: Tensor) -> str:
    """Short hash of dtypes, shapes and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
        flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        values = flat.cpu()
        values = (
            values.float() if values.is_floating_point() and values.element_size() < 4 else values
        )
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Identity:
    """Of a run.

    Attributes:
        settings: What must agree, in words; those of `FOLLOWED` end in a digest, which alone counts.
        details: Digests of the parts of those, by which a message tells what has changed.
        unknown: What of them cannot be told from others, as `Content.unknown`.
    """

    settings: dict[str, str]
    details: dict[str, dict[str, str]] = field(default_factory=dict)
    unknown: dict[str, list[str]] = field(default_factory=dict)

    def note(self, name: str, description: str, content: Content) -> None:
        """Add one of the parts that are followed."""
        self.settings[name] = f"{description} {content.digest}"
        self.details[name] = dict(content.parts)
        if content.unknown:
            self.unknown[name] = list(content.unknown)

    def conflicts(self, saved: Identity, trust: Collection[str]) -> list[str]:
        """What keeps a run from going on where the saved one stopped, in words; `trust` names parts vouched for."""
        there, here, found = saved.settings, self.settings, []
        for name in sorted({**there, **here}):
            if name in trust:
                continue
            a, b = there.get(name), here.get(name)
            followed = name in FOLLOWED and a is not None and b is not None
            if _digest(a) != _digest(b) if followed else a != b:
                parts = changed_parts(saved.details.get(name, {}), self.details.get(name, {}))
                parts = [part for part in parts if part][:SHOWN] if followed else []
                changed = f" (changed: {', '.join(parts)})" if parts else ""
                found.append(f"{name}: {_short(a)} there, {_short(b)} here{changed}")
            elif name in self.unknown:
                found.append(
                    f"{name}: nobody can tell whether it is the same, its {', '.join(self.unknown[name])} cannot be "
                    "read"
                )
        return found


def check_trust(trust: Any) -> frozenset[str]:
    """Return names of parts as a set, or raise InputError."""
    names = (trust,) if isinstance(trust, str) else tuple(trust)
    for name in names:
        if name not in FOLLOWED:
            raise InputError(f"trust names {name!r}; {suggest(str(name), FOLLOWED)}")
    return frozenset(names)


def _digest(text: str | None) -> str | None:
    """The last word."""
    return text and text.split()[-1]


def _short(text: str | None) -> str:
    return (
        "none" if text is None else text if len(text) <= 120 else f"{text[:70]} ... {text[-40:]}"
    )


def describe_prior(prior: Prior) -> str:
    """Return the kind, the precision, the settings and a digest of a prior: all that decides D."""
    return " ".join((_prior_words(prior), _prior_content(prior).digest))


def _prior_words(prior: Prior) -> str:
    return f"{type(prior).__name__} {prior.precision} {prior.extra_repr()}".strip()


def _prior_content(prior: Prior) -> Content:
    names = ("shape", "sigma_min", "sigma_max", "scale", "shift", "affine", "precision")
    return content_of({"": prior, **{name: getattr(prior, name) for name in names}})


def run_identity(
    solver: Solver[Any], problem: Problem, num_samples: int, seed: int, dtype: torch.dtype
) -> Identity:
    """What must agree for a checkpoint to be resumed."""
    identity = Identity(
        {
            "num_samples": str(num_samples),
            "seed": str(seed),
            "shape": str(tuple(problem.shape)),
            "dtype": str(dtype),
            "precision": problem.prior.precision,
        }
    )
    settings = json.dumps(solver.settings, sort_keys=True, default=lambda v: type(v).__name__)
    identity.note("solver", settings, content_of(solver))
    identity.note("prior", _prior_words(problem.prior), _prior_content(problem.prior))
    if problem.condition:
        identity.note("condition", ", ".join(problem.condition), content_of(problem.condition))
    likelihood = problem.likelihood
    if likelihood is not None:
        y, law = likelihood.y, likelihood.noise
        identity.note("operator", _words(likelihood.operator), content_of(likelihood.operator))
        identity.note("noise", type(law).__name__, content_of(law))
        identity.note("y", "x".join(map(str, y.shape)), content_of(y))
    if problem.start is not None:
        identity.settings["init"] = f"{problem.top:.17g} {content_of(problem.start).digest}"
    if problem.reward is not None:
        identity.note("reward", _words(problem.reward), content_of(problem.reward))
    return identity


def _words(thing: Any) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(repr(thing).split()))
