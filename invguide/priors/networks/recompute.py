"""Memory for time: blocks of a network whose activations are computed again in the backward pass, not kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from invguide.errors import InputError
from invguide.numerics.hooks import find_modules


def recompute(net: nn.Module, names: Sequence[str] | None = None) -> list[str]:
    """Keep the inputs of these blocks only, for the backward pass; the network's numbers stay what they are.

    Args:
        net: Changed in place; `keep_all` changes it back.
        names: Dotted names of modules, none inside another; by default those of `find_blocks`.

    Returns:
        The names.

    Raises:
        InputError: An unknown name, a block inside another, or no names and nothing that looks like a block.
    """
    names = list(find_blocks(net) if names is None else names)
    if not names:
        raise InputError(
            f"{type(net).__name__} has no parts of several layers that could be computed again; name its modules: "
            "blocks=(...)"
        )
    blocks = find_modules(net, names)
    for name, block in blocks.items():
        inside = [n for n in names if n.startswith(f"{name}.")]
        if inside:
            raise InputError(f"block {inside[0]!r} is inside block {name!r}; name one of them")
        if "forward" in vars(block):
            raise InputError(f"the forward of block {name!r} is replaced already; leave it out")
    for block in blocks.values():
        forward = partial(_again, partial(type(block).forward, block))
        block.forward = forward
    return names


def keep_all(net: nn.Module) -> None:
    """Undo `recompute`."""
    for module in net.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func is _again:
            del module.forward


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Networks of a prior are in evaluation mode: there is no dropout whose random state would have to be kept.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def find_blocks(net: nn.Module) -> list[str]:
    """Return the names of the blocks that a network is built of.

    These are the entries of its innermost lists of blocks; elsewhere the innermost modules that hold several layers.
    """
    found: list[str] = []
    _collect(net, "", False, found)
    return found


def _collect(module: nn.Module, name: str, entry: bool, found: list[str]) -> None:
    if name and _is_block(module, entry):
        found.append(name)
        return
    for child, part in module.named_children():
        _collect(part, f"{name}.{child}".lstrip("."), _is_list(module), found)


def _is_block(module: nn.Module, entry: bool) -> bool:
    if not _composite(module) or isinstance(module, nn.ModuleList | nn.ModuleDict):
        return False
    lists = (m for m in module.modules() if _is_list(m))
    if any(_composite(part) for parts in lists for part in parts.children()):
        return False
    return entry or sum(map(_composite, module.children())) < 2


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)


def _composite(module: nn.Module) -> bool:
    """Whether it holds several layers with weights."""
    layers = (m for m in module.modules() if any(True for _ in m.parameters(recurse=False)))
    return sum(1 for _ in layers) > 1
