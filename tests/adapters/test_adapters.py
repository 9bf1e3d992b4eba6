"""Any callable or deepinv physics as an operator, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import invguide as ig
from invguide.adapters.operators import FunctionOperator, as_operator, from_deepinv, to_deepinv
from invguide.errors import InputError, ShapeError
from invguide.forward_operator import LinearOperator
from invguide.noise import Gaussian, Poisson
from invguide.numerics.linear import inner, norm
from invguide.operators import HDR, Blur, GaussianBlur, Inpainting, SuperResolution


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# ---- callables


def test_operators_pass_through():
    operator = GaussianBlur(1)
    assert ig.as_operator(operator) is operator


def test_torch_callable_is_differentiable():
    operator = as_operator(lambda x: x.flatten(1)[:, ::2] ** 2)
    x = images(2, 1, 4, 6).requires_grad_()
    assert operator(x).shape == (2, 12)
    assert operator.differentiable
    assert torch.autograd.grad(operator(x).sum(), x)[0].any()


def test_module_moves_with_the_operator():
    operator = as_operator(nn.Conv2d(1, 2, 3))
    assert next(operator.double().parameters()).dtype == torch.float64
    assert operator(images(2, 1, 6, 6)).shape == (2, 2, 4, 4)
    assert operator.differentiable


def numpy_only(x: Any) -> np.ndarray:
    assert isinstance(x, np.ndarray)
    x *= 2  # the array is the function's own
    return x.astype(np.float16).sum(-1)


@pytest.mark.parametrize(
    "function",
    [numpy_only, lambda x: np.sort(x, -1)[..., 0], lambda x: torch.round(x.detach()).sum(-1)],
    ids=["numpy", "numpy-through-torch", "detached"],
)
def test_black_boxes_are_noticed(function: Callable[[Any], Any]):
    operator = as_operator(function)
    x = images(2, 3, 5).float().requires_grad_()
    kept = x.detach().clone()
    with torch.no_grad():
        y = operator(x)
    assert not operator.differentiable
    assert (y.shape, y.dtype) == ((2, 3), torch.float32)
    assert torch.equal(x.detach(), kept)
    assert not operator(x).requires_grad
    assert not as_operator(function, shape=(3, 5)).differentiable, "tried at once"


def test_kind_is_found_under_no_grad_and_inference_mode():
    for context in (torch.no_grad(), torch.inference_mode()):
        operator = as_operator(torch.sin)
        with context:
            operator(images(2, 3))
        assert operator.differentiable
        assert operator(images(2, 3).requires_grad_()).requires_grad


def test_linear_callables():
    matrix = images(7, 12)
    for options in ({"adjoint": lambda y: y @ matrix}, {"linear": True, "shape": (12,)}):
        operator = as_operator(lambda x: x @ matrix.T.to(x), **options)
        assert isinstance(operator, LinearOperator)
        x, y = images(2, 12), images(2, 7) - 0.5
        assert torch.allclose(inner(operator(x), y), inner(x, operator.adjoint(y)))
        if operator.input_shape((7,)) is not None:
            solution = operator.solve(y, 0.1)
            expected = torch.linalg.solve(matrix @ matrix.T + 0.1 * torch.eye(7), y.T).T
            assert torch.allclose(solution, expected, atol=1e-5)


def dark(x: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("no light")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: as_operator(torch.eye(3)), InputError, "lambda x: x.flatten"),
        (lambda: as_operator("blur"), InputError, "the operator is a str; expected"),
        (lambda: as_operator(GaussianBlur), InputError, "pass an instance, GaussianBlur"),
        (lambda: as_operator(torch.sin, linear=True), InputError, "needs shape="),
        (lambda: as_operator(lambda x: x[0])(torch.ones(2, 3)), ShapeError, "2 samples"),
        (lambda: as_operator(lambda x: (x, x))(torch.ones(2, 3)), InputError, "returned tuple"),
        (lambda: as_operator(dark)(torch.ones(2, 3)), InputError, "no light"),
        (lambda: as_operator(np.sort, linear=True, shape=(3,)), InputError, "pass adjoint"),
    ],
)
def test_bad_models_are_named(call: Callable[[], Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()


def test_function_operator_copies():
    operator = FunctionOperator(torch.sin)
    operator(images(2, 3))
    assert torch.equal(copy.deepcopy(operator)(images(2, 3)), operator(images(2, 3)))


# ---- deepinv


physics = pytest.importorskip("deepinv.physics", reason="deepinv is not installed")
SHAPE = (1, 12, 16)


def kernel(height: int = 3, width: int = 3) -> Tensor:
    k = torch.rand(height, width, generator=torch.Generator().manual_seed(2))
    return k / k.sum()


LINEAR: dict[str, tuple[Callable[[], Any], tuple[int, ...], bool]] = {
    "Inpainting": (lambda: physics.Inpainting(SHAPE, mask=0.5), SHAPE, True),
    "Denoising": (lambda: physics.Denoising(), SHAPE, True),
    "BlurFFT": (lambda: physics.BlurFFT(SHAPE, filter=kernel()[None, None]), SHAPE, False),
    "Blur": (lambda: physics.Blur(kernel()[None, None], padding="valid"), SHAPE, False),
    "Downsampling": (
        lambda: physics.Downsampling(SHAPE, filter="bicubic", factor=2),
        SHAPE,
        False,
    ),
    "Tomography": (lambda: physics.Tomography(9, 12, normalize=True), (1, 12, 12), False),
    "MRI": (
        lambda: physics.MRI(mask=torch.eye(12) + 0.0, img_size=(2, 12, 12)),
        (2, 12, 12),
        True,
    ),
    "Decolorize": (lambda: physics.Decolorize(), (3, 12, 12), True),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_physics_is_a_linear_operator(name: str):
    make, shape, spectral = LINEAR[name]
    original = make()
    operator = as_operator(original)
    assert isinstance(operator, LinearOperator)
    x = images(2, *shape)
    assert torch.allclose(operator(x.float()), original.A(x.float()), atol=1e-6)
    assert operator(x).dtype == torch.float64
    assert (operator.svd(x) is not None) == spectral
    certificate = operator.check(shape, quiet=True)
    assert certificate.ok, str(certificate)


def test_half_spectrum_solves_exactly():
    operator: Any = as_operator(physics.BlurFFT(SHAPE, filter=kernel()[None, None]))
    own = Blur(kernel(), "circular")
    x = images(2, *SHAPE)
    assert torch.allclose(operator(x), own(x), atol=1e-6)
    assert torch.allclose(operator.solve(x, 1e-2), own.solve(x, 1e-2), atol=1e-4)


def test_nonlinear_physics_goes_through_autograd():
    operator = as_operator(physics.Ptychography((1, 12, 12)))
    assert not isinstance(operator, LinearOperator)
    assert operator.check((1, 12, 12), quiet=True).ok


def test_noise_law_is_read():
    def law(model: Any) -> Any:
        operator: Any = from_deepinv(physics.Denoising(model))
        return operator.noise

    assert law(physics.ZeroNoise()) is None
    gaussian = law(physics.GaussianNoise(0.1))
    assert isinstance(gaussian, Gaussian)
    assert float(gaussian.sigma_y) == pytest.approx(0.1)
    several = law(physics.GaussianNoise(torch.tensor([0.1, 0.2]))).bind(images(2, 1, 3, 3))
    assert several.sigma_y.shape == (2, 1, 1, 1)
    poisson = law(physics.PoissonNoise(0.02))
    assert isinstance(poisson, Poisson)
    assert poisson.gain == pytest.approx(0.02)


def test_the_physics_is_neither_shared_nor_changed():
    generator = torch.Generator().manual_seed(0)
    original = physics.Inpainting(
        SHAPE, mask=0.5, noise_model=physics.GaussianNoise(0.1, rng=generator)
    )
    settings = (original.solver, original.max_iter, original.tol)
    operator: Any = as_operator(original)
    before = operator(images(1, *SHAPE))
    original.update_parameters(mask=torch.zeros(1, *SHAPE))
    assert torch.equal(operator(images(1, *SHAPE)), before)
    assert torch.equal(copy.deepcopy(operator)(images(1, *SHAPE)), before)
    operator.pinv(before)
    assert (original.solver, original.max_iter, original.tol) == settings


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("wavenumber", [5.0, 2 * np.pi * 3.75])
def test_scattering_is_not_finite_at_some_wavenumbers(wavenumber: float):
    transmitters, receivers = physics.scattering.circular_sensors(3, 1.0)
    model = physics.Scattering(
        img_width=32,
        receivers=receivers,
        transmitters=transmitters,
        background_wavenumber=wavenumber,
    )
    assert as_operator(model).check((1, 32, 32), quiet=True).ok == (wavenumber == 5.0)


# ---- to deepinv


@pytest.mark.parametrize(
    "operator",
    [GaussianBlur(1), SuperResolution(2), Inpainting.box(SHAPE)],
    ids=lambda o: type(o).__name__,
)
def test_to_deepinv_keeps_adjoint_prox_and_pinv(operator: LinearOperator):
    model: Any = operator.to_deepinv(sigma_y=0.1)
    x = images(2, *SHAPE)
    y = operator(x)
    assert torch.equal(model.A(x), y)
    assert torch.equal(model.A_adjoint(y), operator.adjoint(y))
    assert torch.equal(model.A_dagger(y), operator.pinv(y))
    assert (model(x) - y).std() == pytest.approx(0.1, rel=0.3)
    z, gamma = images(2, *SHAPE).flip(-1), torch.tensor([0.5, 20.0]).double()
    optimum = model.prox_l2(z, y, gamma)
    gradient = gamma.reshape(2, 1, 1, 1) * operator.adjoint(operator(optimum) - y) + optimum - z
    assert norm(gradient).max() < 1e-5
    assert torch.allclose(model.prox_l2(0, y, 3.0), model.prox_l2(0 * z, y, 3.0))


def test_round_trip_and_nonlinear():
    original = physics.Inpainting(SHAPE, mask=0.5, noise_model=physics.GaussianNoise(0.1))
    back: Any = to_deepinv(as_operator(original))
    assert type(back) is type(original)
    assert float(back.noise_model.sigma) == pytest.approx(0.1)
    x = images(2, *SHAPE)
    assert torch.equal(to_deepinv(HDR()).A(x), HDR()(x))
