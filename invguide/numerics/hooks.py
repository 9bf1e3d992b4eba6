"""What modules of a network return while it is called, by hooks that live no longer than that call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from invguide.errors import InputError, suggest

Recorded = dict[str, list[Tensor]]  # by module, one entry for each time that it was called


def find_modules(root: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Return the modules with these dotted names.

    Raises:
        InputError: No names, or one that is unknown (the nearest is suggested).
    """
    known = dict(root.named_modules(remove_duplicate=False))
    known.pop("")  # what is called of a prior is `denoise`, which hooks do not see
    if not names:
        raise InputError(f"no module of {type(root).__name__} is named; {suggest('', known)}")
    for name in names:
        if name not in known:
            raise InputError(f"{type(root).__name__} has no module {name!r}; {_hint(name, known)}")
    return {name: known[name] for name in names}


def _hint(name: str, known: dict[str, nn.Module]) -> str:
    if not known:
        return "it has no modules at all: its network must be a torch.nn.Module"
    text = suggest(name, known)
    return text if len(text) < 300 else "list(dict(prior.named_modules())) lists them"


@contextlib.contextmanager
def record(root: nn.Module, names: Sequence[str]) -> Iterator[Recorded]:
    """Record copies of what these modules return inside, differentiable where gradients are on.

    The hooks are gone before any backward pass, so that a forward pass which activation checkpointing repeats there is
    not recorded again; gradients go through the first one.

    Raises:
        InputError: An unknown name, a module that returns something else than a tensor, or one that runs without
            gradients where they are wanted.
    """
    modules = find_modules(root, names)
    found: Recorded = {name: [] for name in names}
    wanted = torch.is_grad_enabled()

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise InputError(
                    f"module {name!r} returns a {type(output).__name__}; name one inside it that returns a tensor"
                )
            if wanted and not torch.is_grad_enabled():
                raise InputError(
                    f"module {name!r} runs without gradients; take it out of torch.no_grad, and checkpoint with "
                    f"use_reentrant=False"
                )
            found[name].append(output.clone())  # the next module may work in place

        return hook

    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_hook(hook_of(name)).remove)
        yield found
