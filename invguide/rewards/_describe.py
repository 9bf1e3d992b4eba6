"""How rewards that hold tensors and networks are shown: the same in every process, as checkpoints need."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from invguide.engine.run_identity import fingerprint


def describe(reward: Any) -> str:
    """Return the repr of a dataclass: tensors by shape and a hash of their values, networks by class or function."""
    shown = ((f.name, getattr(reward, f.name)) for f in fields(reward) if f.init)
    return (
        f"{type(reward).__name__}({', '.join(f'{name}={_text(value)}' for name, value in shown)})"
    )


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"<{'x'.join(map(str, value.shape))} {fingerprint(value)}>"
    if callable(value) and not is_dataclass(value):
        return str(getattr(value, "__name__", type(value).__name__))
    return repr(value)
