"""Small experiments on what others wrote, before it is trusted: does a gradient arrive, is an adjoint one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from invguide.errors import InputError
from invguide.numerics.linear import inner, norm

CUT = "does not reach x: it is cut by detach, numpy or no_grad"
RAISES = "cannot be taken"
ZERO = "is zero everywhere: it rounds, thresholds, or compares"


def gradient_fault(
    function: Callable[[Tensor], Any], x: Tensor, y: Tensor | None = None
) -> str | None:
    """Return why automatic differentiation of a function at x (B, *shape) is of no use, or None where it is.

    One vector-Jacobian product with random weights. Only where that is zero are more signals asked, of other sizes and
    signs: a function that is flat at x is fine, one that is flat at all of them steps.

    Args:
        function: Of clean signals.
        x: Such signals. Only the first is used, unless it alone raises, as with parameters for each row.
        y: function(x), where it was called already, with gradients to x.
    """
    with torch.inference_mode(False), torch.enable_grad():
        if y is not None and y.grad_fn is not None and x.requires_grad:
            fault, found = _fault_of(lambda: _pulled_back(y, x))
            if found:
                return fault
        x = _first(function, x)
        for i, signal in enumerate(_signals(x)):
            fault, found = _fault_of(partial(_gradient, function, signal))
            if found and (i == 0 or fault is None):
                return fault
    return ZERO


def _fault_of(find: Callable[[], Tensor | None]) -> tuple[str | None, bool]:
    """Return the fault of one gradient, and whether it tells about all signals: a zero does not."""
    try:
        gradient = find()
    except InputError:
        raise
    except Exception as error:
        return f"{RAISES}: {type(error).__name__}: {str(error).splitlines()[0]}", True
    if gradient is None:
        return CUT, True
    return None, bool(gradient.any())  # NaN counts: a fault, but no missing gradient


def _first(function: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    x = x.detach()
    if len(x) > 1:
        with torch.no_grad(), suppress(Exception):
            function(x[:1].clone())
            return x[:1]
    return x


def _signals(x: Tensor) -> Iterator[Tensor]:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    size = x.abs().mean() + 1e-3
    for signal in (
        x,
        x + size * noise,
        -x,
        3 * x,
        0.3 * x,
        100 * size * noise,
        0.03 * size * noise,
    ):
        yield signal.detach().clone().requires_grad_()


def _gradient(function: Callable[[Tensor], Any], x: Tensor) -> Tensor | None:
    # A copy, so that functions that write into their argument have one that autograd lets them change.
    y = function(x.clone())
    if (
        not isinstance(y, Tensor) or y.grad_fn is None
    ):  # a view made under no_grad has none, though it requires_grad
        return None
    return _pulled_back(y, x)


def _pulled_back(y: Tensor, x: Tensor) -> Tensor | None:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    total = (y * weights).sum()
    # Of a number: told weights, torch imports sympy, which takes a second.
    return torch.autograd.grad(total.real if total.is_complex() else total, x, allow_unused=True)[
        0
    ]


def adjoint_defect(
    forward: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], x: Tensor
) -> float:
    """Return |<A u, v> - <u, A* v>| / (|A u| |v|), the largest of all rows: one call of each.

    u is random, of the shape of x (B, *shape), and v is A u / |A u| and a random direction: the first makes the
    products large, so that small errors show, and the second sees what A does not reach. An A* v of another shape than
    u counts as infinite.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        u = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        image = forward(u)
        kind = torch.complex128 if image.is_complex() else torch.float64
        direction = torch.randn(image.shape, generator=generator, dtype=kind).to(image)
        v = _unit(image) + _unit(direction)
        back = adjoint(v)
        if back.shape != u.shape:
            return float("inf")
        size = (norm(image) * norm(v)).clamp_min(torch.finfo(image.real.dtype).tiny)
        error = (inner(image, v) - inner(u, back)).abs() / size
    return error.nan_to_num(float("inf")).max().item()


def _unit(a: Tensor) -> Tensor:
    size = norm(a).clamp_min(torch.finfo(a.real.dtype).tiny)
    return a / size.reshape(-1, *(1,) * (a.ndim - 1))


def adjoint_limit(dtype: torch.dtype) -> float:
    """Return the largest defect of an adjoint that is one, computed in this precision, real or complex.

    Both products are sums of rounded terms, whose errors are independent: off by a few eps of |A u| |v|, and by a
    hundred times that where the two go by other routes (Fourier transforms, interpolation at rounded coordinates). 1e-4
    in single precision, and 1e-8 in double, leave a factor of 10 more. An error of one part in a thousand in the
    adjoint's size, a shift or a missing factor is above both; complex numbers count as pairs of real ones.
    """
    return 1e-8 if dtype in (torch.float64, torch.complex128) else 1e-4


@contextmanager
def evaluating(*modules: nn.Module, but: type[nn.Module] | tuple[()] = ()) -> Generator[None]:
    """Put these modules and all inside into evaluation mode, `but` ones of a class, and back as each was found.

    Dropout would make an operator random, and batch normalisation in training mode couples the rows of a batch and
    overwrites its running statistics.
    """
    training = [
        m for module in modules for m in module.modules() if m.training and not isinstance(m, but)
    ]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def modules_of(function: Any, depth: int = 3) -> list[nn.Module]:
    """Return the modules that a callable holds, itself or within what it holds, `depth` objects far.

    Looked at are its owner, attributes, closure, default arguments and the globals that it names.
    """
    if isinstance(function, nn.Module):
        return [function]
    if depth == 0:
        return []
    return [m for thing in _held(function) for m in modules_of(thing, depth - 1)]


def _held(thing: Any) -> list[Any]:
    if isinstance(thing, partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if inspect.ismethod(thing):
        return [thing.__self__, thing.__func__]
    if not inspect.isfunction(thing):
        return list(getattr(thing, "__dict__", {}).values()) if not _is_plain(thing) else []
    names = thing.__globals__
    found = [names[name] for name in thing.__code__.co_names if name in names]
    found += [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
    for cell in thing.__closure__ or ():
        with suppress(ValueError):  # a cell that is empty as yet
            found.append(cell.cell_contents)
    return [part for part in found if not _is_plain(part)]


def _is_plain(thing: Any) -> bool:
    return isinstance(thing, (Tensor, type, ModuleType))
