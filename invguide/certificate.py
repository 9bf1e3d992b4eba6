"""The operator certificate: what a forward operator says of itself, checked on numbers.

Everything that a solver relies on and that user code gets wrong: a batch whose rows share something, an adjoint that is
not one, a gradient that stops on the way, random or non-finite outputs, a changed input.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from invguide.errors import InputError
from invguide.forward_operator import LinearOperator, Operator, inner, norm

OK, NOTE, FAILS = "ok", "note", "FAILS"


class Row(NamedTuple):
    """One property: what was measured, and whether a solver can live with it."""

    name: str
    value: str
    verdict: str


@dataclass
class Certificate:
    """What `Operator.check` found; `ok` unless a row FAILS, and `print` shows the table."""

    operator: str
    rows: list[Row] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(row.verdict != FAILS for row in self.rows)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r}; the certificate has {', '.join(row.name for row in self.rows)}")

    def __str__(self) -> str:
        wide = max(len(row.name) for row in self.rows)
        lines = [f"  {row.name:<{wide}}  {row.verdict:<5}  {row.value}" for row in self.rows]
        return "\n".join(
            [f"{self.operator}: {'fit for use' if self.ok else 'NOT fit for use'}", *lines]
        )


def certify(
    operator: Operator,
    shape: tuple[int, ...] | None = None,
    x: Tensor | None = None,
    seed: int = 0,
) -> Certificate:
    """Examine an operator on clean signals x (B, *shape), data units, or on two of uniform random numbers in [0, 1].

    Runs in double precision where the operator allows it.

    Raises:
        InputError: Neither shape nor x is given, or both.
    """
    if (shape is None) == (x is None):
        raise InputError(
            "check needs either shape=(...), one sample without the batch axis, or x=(B, *shape)"
        )
    generator = torch.Generator().manual_seed(seed)
    if x is None:
        assert shape is not None
        x = torch.rand((2, *shape), generator=generator)
    home = next((t.device for t in (*operator.parameters(), *operator.buffers())), x.device)
    x = x.detach().to(home)
    x = torch.cat([x, x.flip(-1)]) if len(x) == 1 else x
    return _Examination(operator, x, generator).run()


class _Examination:
    def __init__(self, operator: Operator, x: Tensor, generator: torch.Generator) -> None:
        self.operator, self.x, self.generator = operator, x, generator
        self.certificate = Certificate(f"{type(operator).__name__}({operator.extra_repr()})")
        self.tolerance = 1e-10

    def add(self, name: str, good: bool | None, value: str) -> bool:
        """Record a row; good None makes it a note."""
        verdict = NOTE if good is None else OK if good else FAILS
        self.certificate.rows.append(Row(name, value, verdict))
        return good is not False

    def normal(self, like: Tensor) -> Tensor:
        kind = torch.complex128 if like.is_complex() else torch.float64
        return torch.randn(like.shape, generator=self.generator, dtype=kind).to(like)

    def run(self) -> Certificate:
        y = self.measure()
        if y is None:
            return self.certificate
        self.repetition(y)
        self.linearity()
        self.gradient()
        if isinstance(self.operator, LinearOperator):
            operator = self.operator
            for name, examine in {
                "adjoint": self.adjoint,
                "svd": self.svd,
                "solve": self.solve,
                "pinv": self.pinv,
            }.items():
                self.guarded(name, lambda examine=examine: examine(operator, y))
        self.scale(y)
        return self.certificate

    def guarded(self, name: str, examine: Callable[[], object]) -> None:
        try:
            examine()
        except Exception as error:
            self.add(name, False, f"raises {_brief(error)}")

    def measure(self) -> Tensor | None:
        """Find a precision in which the operator runs; None where no further question makes sense."""
        # Values that float32 cannot hold, so that an operator which rounds to it gives itself away.
        x, reason = self.x.double(), ""
        x = x * (1 - 1e-9 * torch.rand(x.shape, generator=self.generator).to(x))
        try:
            y = self.operator(x.clone())
        except Exception as error:
            reason = _brief(error)
            x = self.x.float()
            try:
                y = self.operator(x.clone())
            except Exception as error:
                return self._only_single_rows(x, error)
        if not isinstance(y, Tensor) or y.ndim == 0 or len(y) != len(x):
            got = f"a tensor {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            self.add(
                "runs", False, f"{tuple(x.shape)} gave {got}; the first axis must stay {len(x)}"
            )
            return None
        self.x = x
        self.add(
            "runs",
            True,
            f"{tuple(x.shape[1:])} -> {tuple(y.shape[1:])}, {y.dtype}".replace("torch.", ""),
        )
        y = y.detach()
        if not self.add("finite", *_finite(y)):
            return None
        if x.dtype == torch.float32:
            self.tolerance = 1e-4
            self.add("precision", None, f"float32 only; float64 raises {reason}")
        elif torch.equal(y, y.to(torch.complex64 if y.is_complex() else torch.float32).to(y)):
            self.tolerance = 1e-4
            self.add("precision", None, "float32 inside, whatever x is")
        else:
            self.add("precision", True, "float64")
        return y

    def _only_single_rows(self, x: Tensor, error: Exception) -> None:
        try:
            y = self.operator(x[:1].clone())
        except Exception:
            self.add("runs", False, f"raises {_brief(error)}")
        else:
            self.add("runs", True, "one sample at a time")
            self.add("finite", *_finite(y))
            self.add("rows independent", False, f"a batch of {len(x)} raises {_brief(error)}")

    def repetition(self, y: Tensor) -> None:
        x = self.x.clone()
        again = self.operator(x).detach()
        changed = not torch.equal(x, self.x)
        self.add("input unchanged", not changed, "x is changed in place" if changed else "yes")
        self.add("deterministic", *_difference(again, y, 0.1 * self.tolerance))
        alone = torch.cat([self.operator(row.clone()[None]).detach() for row in self.x])
        # Another companion: rows that share a quantity may still agree on the batch itself.
        crowd = self.operator(torch.cat([self.x, self.x.flip(0) * 0.5 + 0.1])).detach()[: len(y)]
        worst = max(((alone, y), (crowd, y)), key=lambda pair: _relative(*pair))
        self.add("rows independent", *_difference(*worst, self.tolerance))
        shared = (
            y.untyped_storage().data_ptr()
            == self.operator(x).untyped_storage().data_ptr()
            == x.data_ptr()
        )
        if shared:
            self.add("own memory", None, "y shares the memory of x")

    def linearity(self) -> None:
        u, v = self.x, self.normal(self.x)
        try:
            image_u, image_v = self.operator(u).detach(), self.operator(v).detach()
            combined = self.operator(0.7 * u - 1.3 * v).detach()
        except Exception as error:
            self.add(
                "linear",
                None if not isinstance(self.operator, LinearOperator) else False,
                f"raises {_brief(error)}",
            )
            return
        defect = norm(combined - 0.7 * image_u + 1.3 * image_v)
        error = (defect / (norm(image_u) + norm(image_v)).clamp_min(1e-300)).max().item()
        linear = error <= self.tolerance
        if isinstance(self.operator, LinearOperator):
            self.add("linear", linear, f"relative defect {error:.1e}")
        elif linear:
            self.add(
                "linear",
                None,
                "yes, but not declared: a LinearOperator has more and faster solvers",
            )
        else:
            self.add("linear", True, f"no (relative defect {error:.1e})")

    def gradient(self) -> None:
        declared = self.operator.differentiable
        x = self.x.clone().requires_grad_()
        try:
            y = self.operator(x)
            reaches = y.requires_grad
            gradient = (
                torch.autograd.grad(y, x, self.normal(y.detach()).resolve_conj())[0]
                if reaches
                else None
            )
        except Exception as error:
            self.add("differentiable", not declared, f"raises {_brief(error)}")
            return
        declared = self.operator.differentiable  # a callable knows only after its first call
        if gradient is None:
            fix = (
                "; set differentiable = False or remove detach, numpy and in-place steps"
                if declared
                else ""
            )
            self.add("differentiable", not declared, f"no, the gradient does not reach x{fix}")
            return
        if not bool(torch.isfinite(gradient).all()):
            self.add("differentiable", not declared, "the gradient is not finite")
        elif not bool(gradient.any()):
            self.add("differentiable", not declared, "the gradient is zero everywhere")
        elif not declared:
            self.add("differentiable", None, "yes, but declared a black box")
        else:
            self.slope()

    def slope(self) -> None:
        """Directional derivative: automatic against central differences."""
        x, direction = self.x.clone().requires_grad_(), self.normal(self.x)
        y = self.operator(x)
        weights = y.detach() / norm(y.detach()).max()
        automatic = inner(torch.autograd.grad(y, x, weights)[0], direction)
        step = 1e-6 if self.tolerance < 1e-6 else 1e-2
        with torch.no_grad():
            change = self.operator(self.x + step * direction) - self.operator(
                self.x - step * direction
            )
        numeric = inner(weights, change / (2 * step))
        size = norm(change / (2 * step)) * norm(weights)
        error = ((automatic - numeric).abs() / size.clamp_min(1e-300)).max().item()
        exact = error <= (1e-4 if self.tolerance < 1e-6 else 1e-2)
        text = f"relative to central differences {error:.1e}"
        self.add(
            "differentiable",
            True if exact else None,
            text if exact else f"{text}: a surrogate or a rough gradient",
        )

    def adjoint(self, operator: LinearOperator, y: Tensor) -> None:
        worst = 0.0
        u = self.normal(self.x)
        image = operator(u).detach()
        # A random v sees all of y; v = A u makes the products large, so that small errors show.
        for v in (self.normal(y), image):
            back = operator.adjoint(v)
            if back.shape != u.shape:
                self.add(
                    "adjoint",
                    False,
                    f"has shape {tuple(back.shape[1:])} for x {tuple(u.shape[1:])}",
                )
                return
            error = (inner(image, v) - inner(u, back)).abs() / (norm(image) * norm(v)).clamp_min(
                1e-300
            )
            worst = max(worst, error.nan_to_num(float("inf")).max().item())
        self.add("adjoint", worst <= self.tolerance, f"|<Au,v> - <u,A*v>| / |Au||v| = {worst:.1e}")

    def svd(self, operator: LinearOperator, y: Tensor) -> None:
        svd = operator.svd(self.x)
        if svd is None:
            self.add("svd", True, "none")
            return
        z = self.normal(svd.V_adjoint(self.x)) * (svd.s != 0)
        errors = [_relative(svd.U(svd.s * svd.V_adjoint(self.x)), y)]
        errors += [_relative(svd.V_adjoint(svd.V(z)), z), _relative(svd.U_adjoint(svd.U(z)), z)]
        worst = max(errors)
        low, high = svd.s.abs().min().item(), svd.s.abs().max().item()
        limit = max(1e-6, self.tolerance)
        self.add(
            "svd",
            worst <= limit,
            f"relative error {worst:.1e}; singular values {low:.2g} to {high:.2g}",
        )

    def solve(self, operator: LinearOperator, y: Tensor) -> None:
        ridge = 1e-2 * (norm(operator.adjoint(y)) / norm(y)).square().mean().item()
        solution = operator.solve(y, ridge)
        residual = _relative(operator(operator.adjoint(solution)) + ridge * solution, y)
        self.add(
            "solve", residual <= max(1e-5, self.tolerance), f"relative residual {residual:.1e}"
        )

    def pinv(self, operator: LinearOperator, y: Tensor) -> None:
        error = _relative(operator(operator.pinv(y)), y)
        self.add(
            "pinv",
            True if error <= max(1e-5, self.tolerance) else None,
            f"|A A^+ A x - A x| / |A x| = {error:.1e}",
        )

    def scale(self, y: Tensor) -> None:
        gain = (norm(y) / norm(self.x).clamp_min(1e-300)).max().item()
        parts = torch.view_as_real(y) if y.is_complex() else y
        self.add(
            "scale",
            True,
            f"|A x| / |x| = {gain:.3g}; values {parts.min():.3g} to {parts.max():.3g}",
        )
        start = time.perf_counter()
        with torch.no_grad():
            self.operator(self.x).sum().item()
        self.add(
            "time", True, f"{1e3 * (time.perf_counter() - start) / len(self.x):.3g} ms per sample"
        )


def _relative(a: Tensor, b: Tensor) -> float:
    error = norm(a - b) / norm(b).clamp_min(1e-300)
    return error.nan_to_num(float("inf")).max().item()


def _difference(a: Tensor, b: Tensor, tolerance: float) -> tuple[bool, str]:
    error = _relative(a, b)
    return error <= tolerance, "yes" if error == 0 else f"relative difference {error:.1e}"


def _finite(y: Tensor) -> tuple[bool, str]:
    bad = int((~torch.isfinite(y)).sum())
    return bad == 0, "yes" if bad == 0 else f"{bad} of {y.numel()} values are NaN or infinite"


def _brief(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text if len(text) <= 100 else text[:97] + '...'}"
