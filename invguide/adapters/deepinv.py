"""Physics of deepinv as operators. deepinv is imported where it is needed only: it takes longer than torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from invguide.adapters.deepinv_noise import noise_law, refuse_sensor
from invguide.adapters.deepinv_stack import DeepinvLinearStack, DeepinvStack
from invguide.errors import InputError
from invguide.forward_operator import SVD, LinearOperator, Operator, check_batch, columns
from invguide.numerics.trial import adjoint_defect, adjoint_limit
from invguide.system.devices import out_of_memory

if TYPE_CHECKING:
    from deepinv.physics import Physics

# Larger spectra are not written down: n calls of the operator and an SVD of n columns, two seconds at most.
DENSE_UNKNOWNS, DENSE_NUMBERS = 1024, 4096


def from_deepinv(physics: Physics) -> Operator:
    """Return a deepinv physics as an operator; a linear one keeps adjoint, pseudo-inverse and SVD.

    The physics is cloned, and never given keyword arguments, which would overwrite its parameters for good. Its noise
    model becomes the `noise` of the operator: see `adapters.deepinv_noise`. Pictures are real, also where the physics
    computes with complex ones. Parameters may have one row per measurement (masks, filters, noise levels). A stack
    measures its parts flattened and joined, and takes y as the TensorList that it returns.

    Raises:
        InputError: A sensor model, which acts after the noise.
    """
    from deepinv.physics import LinearPhysics, StackedPhysics

    linear = isinstance(physics, LinearPhysics)
    if isinstance(physics, StackedPhysics):
        parts = [from_deepinv(part) for part in physics.physics_list]  # pyright: ignore[reportArgumentType]
        return DeepinvLinearStack(parts) if linear else DeepinvStack(parts)
    refuse_sensor(physics)
    return DeepinvLinear(physics) if linear else DeepinvOperator(physics)


class DeepinvOperator(Operator):
    """A deepinv physics without its noise, on real pictures.

    Calls are in the precision that the physics allows: that of x, else single, else complex, which the first call finds
    out; y comes back in that of x. A physics that cannot take a batch, or mixes its rows, is given one row at a time.
    """

    def __init__(self, physics: Physics) -> None:
        super().__init__()
        self.physics: Any = physics.clone()
        self.noise = noise_law(self.physics.noise_model)
        # The law is kept above. The module would hold a random generator, which cannot be copied.
        self.physics.noise_model = nn.Identity()
        self._seen_batch = self._one_by_one = False
        self._own_rows: tuple[str, ...] = ()  # tensors of the physics with one row per measurement
        self._casts: dict[tuple[str, torch.dtype], torch.dtype] = {}

    @property
    def _name(self) -> str:
        return type(self.physics).__name__

    def _call(self, what: str, x: Tensor) -> Tensor:
        """Call a method of the physics on x, real or complex, and return its precision to that of x."""
        y = self._cast_call(what, x)
        if not isinstance(y, Tensor):
            raise InputError(
                f"{self._name}.{what} gave a {type(y).__name__}; one tensor is needed. Flatten and join the parts: "
                f"as_operator(lambda x: torch.cat([part.flatten(1) for part in physics.A(x)], 1))"
            )
        precision = x.real.dtype
        return y.to(precision.to_complex() if y.is_complex() else precision)

    def _cast_call(self, what: str, x: Tensor) -> Any:
        function, first = getattr(self.physics, what), None
        single = torch.complex64 if x.is_complex() else torch.float32
        known = self._casts.get((what, x.dtype))
        kinds = [x.dtype, single, torch.complex64] if known is None else [known]
        for kind in dict.fromkeys(kinds):
            try:
                y = function(x.to(kind).clone())
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                first = first or error
                continue
            self._casts[what, x.dtype] = kind
            return y
        assert first is not None
        raise first

    def _named(self, what: str, x: Tensor) -> Tensor:
        try:
            return self._call(what, x)
        except InputError:
            raise
        except Exception as error:
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise
            text = str(error).strip().splitlines() or [""]
            raise InputError(
                f"{self._name} cannot take a tensor of shape {tuple(x.shape)} ({what}: {type(error).__name__}: "
                f"{text[0][:200]}); is this the shape of its signals?"
            ) from error

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1 and not self._seen_batch:
            self._try_batch(x)
        if self._one_by_one:
            y = torch.cat([self._named("A", row[None]) for row in x])
        else:
            y = self._named("A", x)
        check_batch(self, x, y)
        return y

    # ---- rows

    def _try_batch(self, x: Tensor) -> None:
        """Find out whether rows may be given together, and which parameters have a row for each."""
        self._seen_batch = True
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        probe = x.detach() + 0.1 * (x.detach().abs().mean() + 0.1) * noise
        with torch.no_grad():
            whole, alone = self._tried(probe), self._tried(probe[1:2])
            if whole is not None and alone is not None and _same(whole[1:2], alone):
                return
            names = tuple(n for n, t in self._tensors(self.physics) if len(t) == len(x) > 1)
            if names and whole is not None:
                one = self._of_rows(torch.tensor([1]), names)._tried(probe[1:2])
                if one is not None and _same(whole[1:2], one):
                    self._own_rows = names
                    return
            self._one_by_one = alone is not None and len(alone) == 1

    def _tried(self, x: Tensor) -> Tensor | None:
        try:
            y = self._call("A", x)
        except Exception:
            return None
        return y if y.ndim and len(y) == len(x) else None

    @staticmethod
    def _tensors(physics: nn.Module) -> list[tuple[str, Tensor]]:
        named = [*physics.named_buffers(), *physics.named_parameters()]
        return [(name, tensor) for name, tensor in named if tensor.ndim > 1]

    def _of_rows(self, index: Tensor, names: Sequence[str]) -> DeepinvOperator:
        part = copy(self)
        part._modules = dict(self._modules)
        part.physics = self.physics.clone()
        for name in names:
            where, _, own = name.rpartition(".")
            module = part.physics.get_submodule(where)
            tensor = getattr(module, own)
            chosen = tensor.detach()[index.to(tensor.device)].clone()
            if own in module._buffers:
                module._buffers[own] = chosen
            else:
                module._parameters[own] = nn.Parameter(chosen, requires_grad=False)
        return part

    def rows(self, index: Tensor) -> Operator:
        return self._of_rows(index, self._own_rows) if self._own_rows else self

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...] | None:
        size = getattr(self.physics, "img_size", None)
        if size is None:
            return None
        size = tuple(int(n) for n in size)
        # Physics with complex pictures leave the axis of their two parts out of img_size, others that of channels.
        for shape in dict.fromkeys((size, (2, *size[-2:]), (1, *size))):
            y = self._tried(torch.zeros(1, *shape))
            if y is not None and tuple(y.shape[1:]) == y_shape:
                return shape
        return size

    def identity_parts(self) -> Any:
        return {"physics": self.physics}  # what the trials found follows from it

    def extra_repr(self) -> str:
        return self._name


class DeepinvLinear(DeepinvOperator, LinearOperator):
    """A linear deepinv physics.

    Its adjoint is tried before the first use, and replaced by that of automatic differentiation where it is wrong. What
    deepinv calls an SVD is used only as far as it holds: that the adjoints invert U and V is tried for every use, and
    for `svd` that they keep lengths, which the half spectra of real Fourier transforms (`BlurFFT`) do not. A small
    physics without one is written down as a matrix.
    """

    def __init__(self, physics: Physics) -> None:
        super().__init__(physics)
        self._by_autograd: tuple[int, ...] | None = (
            None  # shape of one x, where the adjoint is wrong
        )
        self._adjoint_tried = False
        self._dense: SVD | None = None

    def adjoint(self, y: Tensor) -> Tensor:
        if not self._adjoint_tried:
            self._try_adjoint(y)
        if self._by_autograd is not None:
            return self._autograd_adjoint(y)
        return self._given_adjoint(y)

    def _given_adjoint(self, y: Tensor) -> Tensor:
        if self._one_by_one:
            x = torch.cat([self._named("A_adjoint", row[None]) for row in y])
        else:
            x = self._named("A_adjoint", y)
        return x.real if x.is_complex() else x  # of real pictures

    def _autograd_adjoint(self, y: Tensor) -> Tensor:
        assert self._by_autograd is not None
        with torch.inference_mode(False), torch.enable_grad():
            x = y.real.new_zeros((len(y), *self._by_autograd), requires_grad=True)
            (gradient,) = torch.autograd.grad(self.forward(x), x, y.clone())
        return gradient

    def _try_adjoint(self, y: Tensor) -> None:
        self._adjoint_tried = True
        with torch.no_grad():
            back = self._given_adjoint(y)
            limit = adjoint_limit(
                torch.float32
            )  # deepinv computes in single precision, whatever x is
            defect = adjoint_defect(self.forward, self._given_adjoint, back)
            if defect <= limit:
                return
            self._by_autograd = tuple(back.shape[1:])
            try:
                mended = adjoint_defect(self.forward, self._autograd_adjoint, back)
            except RuntimeError:  # no gradient reaches x
                mended = float("inf")
        if mended > limit:
            self._adjoint_tried, self._by_autograd = False, None
            raise InputError(
                f"A_adjoint of {self._name} is not the adjoint of A, |<A u, v> - <u, A* v>| / |A u||v| = {defect:.1g}, "
                f"nor has A one by automatic differentiation; is A linear? Pass physics.A as the operator, not "
                f"taken as linear then"
            )
        warnings.warn(
            f"A_adjoint of {self._name} is not the adjoint of A: |<A u, v> - <u, A* v>| / |A u||v| = {defect:.1g}, "
            f"above {limit:g}; the adjoint of automatic differentiation ({mended:.1g}) is used in its place",
            stacklevel=2,
        )

    # ---- spectra

    def _factors(self, z: Tensor) -> tuple[SVD, bool] | None:
        """Return deepinv's factors for spectra like z (B, ...), and whether they keep lengths; None if wrong."""
        mask = getattr(self.physics, "mask", None)
        if (
            not isinstance(mask, Tensor)
            or mask.is_complex()
            or (mask.ndim == z.ndim and len(mask) > 1)
        ):
            return None
        call = self._call
        s = mask.to(z.real.dtype).expand(z[:1].shape)[0]
        V, U = call("V", z), call("U", z)
        if not (_close(call("V_adjoint", V), z) and _close(call("U_adjoint", U), z)):
            return None
        svd = SVD(
            s,
            U=lambda z: call("U", z),
            U_adjoint=lambda y: call("U_adjoint", y),
            V=lambda z: call("V", z),
            V_adjoint=lambda x: call("V_adjoint", x),
        )
        return svd, _close(V.norm(), z.norm()) and _close(U.norm(), z.norm())

    @property
    def _decomposable(self) -> bool:
        from deepinv.physics import DecomposablePhysics

        return isinstance(self.physics, DecomposablePhysics)

    def svd(self, x: Tensor) -> SVD | None:
        if self._own_rows or self._one_by_one:
            return None
        found = None
        if self._decomposable:
            generator = torch.Generator().manual_seed(0)
            probe = torch.randn(x[:1].shape, generator=generator).to(x)
            found = self._factors(self._call("V_adjoint", probe))
        return found[0] if found is not None and found[1] else None

    def _svd_for(self, y: Tensor) -> SVD | None:
        if self._own_rows or self._one_by_one:
            return None
        if not self._decomposable:
            return self._written_down(y)
        found = self._factors(self._call("U_adjoint", y[:1]))
        return None if found is None else found[0]

    def _written_down(self, y: Tensor) -> SVD | None:
        """The SVD of the matrix of a small physics, from one call for each unknown."""
        if y[0].numel() > DENSE_NUMBERS or y.is_complex():
            return None
        if self._dense is None:
            shape = self.adjoint(y[:1]).shape[1:]
            if shape.numel() > DENSE_UNKNOWNS:
                return None
            image = columns(self, tuple(shape), torch.empty(0, device=y.device))
            self._dense = dense_svd(image.flatten(1).T.double(), tuple(shape), tuple(y.shape[1:]))
        s, *maps = self._dense
        return SVD(s.to(y), *maps)


def dense_svd(matrix: Tensor, x_shape: tuple[int, ...], y_shape: tuple[int, ...]) -> SVD:
    """Return the SVD of a matrix (m, n), as maps between batches of x (B, *x_shape) and y (B, *y_shape)."""
    left, s, right = torch.linalg.svd(matrix, full_matrices=False)

    def times(a: Tensor, shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        return lambda v: (v.flatten(1) @ a.to(v)).reshape(len(v), *shape)

    k = (len(s),)
    return SVD(s, times(left.T, y_shape), times(left, k), times(right, x_shape), times(right.T, k))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and _close(a, b)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 1e-4 * b.norm())


# ---- stacks
