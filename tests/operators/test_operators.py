"""Every operator against the algebra that solvers rely on, and against scipy and PIL."""

from __future__ import annotations

import copy
import doctest
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

import invguide.operators as ops
from every_operator import EVERY, LINEAR, SHAPE, kernel
from invguide.errors import InputError, ShapeError
from invguide.forward_operator import LinearOperator, Operator
from invguide.numerics.linear import conjugate_gradient, inner, norm, per_sample
from invguide.operators import (
    HDR,
    JPEG,
    Blur,
    Composition,
    GaussianBlur,
    Grayscale,
    Inpainting,
    JPEGCoefficients,
    MotionBlur,
    NonlinearBlur,
    SuperResolution,
)

linear = pytest.mark.parametrize("operator", LINEAR.values(), ids=LINEAR.keys())
every = pytest.mark.parametrize("operator", EVERY.values(), ids=EVERY.keys())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(batch: int = 2, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((batch, *shape), generator=generator, dtype=torch.float64)


def dot_error(operator: LinearOperator, x: Tensor, seed: int = 5) -> float:
    """|<Au, v> - <u, A*v>| relative to |Au| |v|: blind to the scale of the operator."""
    image = operator(x)
    v = normal(*image.shape, seed=seed)
    error = (inner(image, v) - inner(x, operator.adjoint(v))).abs()
    return (error / (norm(image) * norm(v))).max().item()


def dense(operator: Operator, shape: tuple[int, ...]) -> Tensor:
    """The matrix of the operator, column by column, (y elements, x elements)."""
    basis = torch.eye(int(np.prod(shape)), dtype=torch.float64).reshape(-1, *shape)
    return operator(basis).flatten(1).T


@pytest.mark.parametrize("name", ops.__all__)
def test_examples(name: str):
    module = sys.modules[getattr(ops, name).__module__]
    assert doctest.testmod(module).failed == 0


def test_every_operator_is_in_a_table():
    covered = {type(operator).__name__ for operator in EVERY.values()}
    assert set(ops.__all__) <= covered


@every
def test_contract(operator: Operator):
    certificate = operator.check(SHAPE, quiet=True)
    assert certificate.ok, str(certificate)


@linear
def test_dot_test(operator: LinearOperator):
    assert dot_error(operator, normal(2, *SHAPE)) < 1e-10


def test_dot_test_notices_a_wrong_adjoint():
    class Shifted(GaussianBlur):
        def adjoint(self, y: Tensor) -> Tensor:
            return super().adjoint(y).roll(1, -1)

    assert dot_error(Shifted(0.8), normal(2, *SHAPE)) > 1e-3


@linear
def test_matrix_and_its_transpose(operator: LinearOperator):
    shape = (3, 8, 9)
    if isinstance(operator, Inpainting):
        operator = Inpainting.box(shape, 3, 4)
    if isinstance(operator, JPEGCoefficients):
        operator = JPEGCoefficients(
            shape[1:], operator.colour, operator.factors, operator.orientation
        )
    matrix = dense(operator, shape)
    x = normal(1, *shape)
    assert torch.allclose(matrix @ x.flatten(), operator(x).flatten(), atol=1e-12)
    y = normal(*operator(x).shape)
    assert torch.allclose(matrix.T @ y.flatten(), operator.adjoint(y).flatten(), atol=1e-12)


@linear
def test_vjp_is_the_adjoint(operator: LinearOperator):
    x = images().requires_grad_()
    y = operator(x)
    v = normal(*y.shape)
    assert torch.allclose(torch.autograd.grad(y, x, v)[0], operator.adjoint(v), atol=1e-12)


@linear
def test_svd(operator: LinearOperator):
    x = normal(2, *SHAPE)
    svd = operator.svd(x)
    exact = ("gaussian", "sr", "inpainting", "identity", "gray", "circular", "disk-reflect")
    name = next(key for key, value in LINEAR.items() if value is operator)
    assert (svd is not None) == any(part in name for part in exact)
    if svd is None:
        return
    assert torch.allclose(svd.U(svd.s * svd.V_adjoint(x)), operator(x), atol=1e-10)
    z = normal(2, *svd.s.shape) * (svd.s != 0)
    for there, back in ((svd.U, svd.U_adjoint), (svd.V, svd.V_adjoint)):
        assert torch.allclose(back(there(z)), z, atol=1e-10)
        assert torch.allclose(norm(there(z)), norm(z))


@linear
def test_solve_inverts(operator: LinearOperator):
    y = operator(normal(2, *SHAPE))
    y = y + 0.1 * normal(*y.shape, seed=1)
    ridge = torch.tensor([1e-2, 0.5], dtype=torch.float64)
    solution = operator.solve(y, ridge)
    back = operator(operator.adjoint(solution)) + per_sample(ridge, solution) * solution
    assert (norm(back - y) / norm(y)).max() < 2e-6
    # Samples are solved apart.
    assert torch.allclose(operator.solve(y[1:], 0.5), solution[1:], rtol=1e-6, atol=1e-9)


@linear
def test_pinv(operator: LinearOperator):
    """A A^+ A = A, and A^+ y is in the range of A*, so it is the solution of least norm."""
    x = normal(2, *SHAPE)
    y = operator(x)
    inverse = operator.pinv(y)
    exact = operator.svd(x) is not None
    assert (norm(operator(inverse) - y) / norm(y)).max() < (1e-6 if exact else 2e-3)
    if exact:
        null = x - operator.pinv(operator(x))
        assert (inner(inverse, null).abs() / (norm(inverse) * norm(x))).max() < 1e-6


@every
def test_shapes_dtypes_and_input_shape(operator: Operator):
    for dtype in (torch.float32, torch.float64):
        x = images().to(dtype)
        kept = x.clone()
        y = operator(x)
        assert y.dtype == dtype
        assert torch.equal(x, kept)
        assert operator.input_shape(tuple(y.shape[1:])) == SHAPE


@every
def test_device_and_gradient(operator: Operator, device: torch.device):
    operator = copy.deepcopy(operator).to(device)
    x = images().float().to(device).requires_grad_()
    y = operator(x)
    assert y.device.type == device.type
    (gradient,) = torch.autograd.grad((y**2).sum(), x)
    assert torch.isfinite(gradient).all()
    assert gradient.any()


@every
def test_pickle_and_copy(operator: Operator):
    buffer = io.BytesIO()
    torch.save(operator, buffer)
    buffer.seek(0)
    x = images()
    for twin in (torch.load(buffer, weights_only=False), copy.deepcopy(operator)):
        assert type(twin) is type(operator)
        assert torch.equal(twin(x), operator(x))
    assert len(buffer.getvalue()) < 50_000, "no matrices that depend on the image size"


def test_matrices_cached_under_inference_mode_allow_gradients_later():
    operator = GaussianBlur(0.77)
    with torch.inference_mode():
        operator(images())
        assert operator.svd(images()) is not None
    x = images().requires_grad_()
    operator.pinv(operator(x)).sum().backward()
    assert x.grad is not None


# ---- against other libraries


@pytest.mark.parametrize(("padding", "mode"), [("reflect", "reflect"), ("circular", "wrap")])
def test_gaussian_blur_is_that_of_scipy(padding: str, mode: str):
    x = images(1)
    expected = ndimage.gaussian_filter(x[0].numpy(), (0, 1.7, 1.7), mode=mode)
    assert np.allclose(GaussianBlur(1.7, padding)(x)[0].numpy(), expected, atol=1e-12)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("padding", "mode"), [("reflect", "reflect"), ("circular", "wrap")])
def test_blur_is_the_convolution_of_scipy(padding: str, mode: str):
    x, k = images(1), kernel(5, 3)
    expected = ndimage.convolve(x[0].numpy(), k.numpy()[None], mode=mode)
    assert np.allclose(Blur(k, padding)(x)[0].numpy(), expected, atol=1e-12)  # pyright: ignore[reportArgumentType]
    inside = expected[:, 2:-2, 1:-1]
    assert np.allclose(Blur(k, "valid")(x)[0].numpy(), inside, atol=1e-12)


@pytest.mark.parametrize(("name", "method"), [("bicubic", "BICUBIC"), ("box", "BOX")])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_super_resolution_is_that_of_pil(name: str, method: str, factor: int):
    x = images(1, shape=(1, 12 * factor, 9 * factor))
    resized = Image.fromarray(x[0, 0].float().numpy()).resize(
        (9, 12), getattr(Image.Resampling, method)
    )
    y = SuperResolution(factor, name)(x)[0, 0].numpy()  # pyright: ignore[reportArgumentType]
    # PIL computes in single precision, and cuts the kernel off at the edges, where we reflect.
    assert np.allclose(y[2:-2, 2:-2], np.asarray(resized)[2:-2, 2:-2], atol=1e-5)


def test_super_resolution_keeps_constants_and_counts_every_pixel():
    for factor in (2, 3, 5):
        for name in ("bicubic", "box", "gaussian"):
            operator = SuperResolution(factor, name)
            assert torch.allclose(operator(torch.ones(1, 1, 7, 11)), torch.ones(()))
            assert operator(torch.ones(1, 1, 7, 11)).shape[2:] == (
                -(-7 // factor),
                -(-11 // factor),
            )


def test_super_resolution_of_a_size_that_y_does_not_tell():
    x = images()  # 13 x 18
    fixed = SuperResolution(4, size=(13, 18))
    assert fixed.input_shape((3, 4, 5)) == SHAPE
    assert SuperResolution(4).input_shape((3, 4, 5)) == (3, 16, 20)
    assert fixed.pinv(fixed(x)).shape == x.shape
    with pytest.raises(ShapeError, match="size=\\(13, 18\\) and given 16 x 20"):
        fixed(torch.zeros(1, 3, 16, 20))


@pytest.mark.parametrize("quality", [20, 50, 90])
def test_jpeg_is_near_that_of_pil(quality: int):
    coarse = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.interpolate(coarse, size=(41, 63), mode="bicubic").clamp(0, 1)
    x = (255 * x).round()
    pixels = x[0].permute(1, 2, 0).byte().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=2)
    file = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)[None] / 255
    y = JPEG(quality)(x / 255)
    # Kornia keeps (c - r)^3 of what rounding loses, and subsamples colour in its own way.
    assert norm(y - file) < 0.6 * norm(x / 255 - file)
    assert JPEG(quality)(x[:, :1] / 255).shape == x[:, :1].shape


def test_motion_blur_kernel():
    horizontal = MotionBlur(5).kernel
    assert horizontal.shape[0] == 1
    assert torch.allclose(MotionBlur(5, 90).kernel, horizontal.T, atol=1e-6)
    up_right = MotionBlur(9, 45).kernel
    assert up_right[0, -1] > 0
    assert up_right[0, 0] == 0
    for angle in (0, 17, 45, 133):
        k = MotionBlur(7.3, angle).kernel
        assert abs(k.sum() - 1) < 1e-6
        assert torch.allclose(k, k.flip(0, 1), atol=1e-6)


def test_nonlinear_blur_with_gamma_one_is_blur():
    x = images()
    assert torch.allclose(NonlinearBlur(kernel(), gamma=1)(x), Blur(kernel())(x))
    grey = torch.full((1, 1, 8, 8), 0.4, dtype=torch.float64)
    assert torch.allclose(NonlinearBlur(kernel())(grey), grey, atol=1e-4)


def test_hdr_pivot_is_the_task_of_the_papers():
    x = images()
    published = (2 * (2 * x - 1)).clamp(-1, 1)
    assert torch.allclose(HDR(2, pivot=0.5)(x), (published + 1) / 2)


def test_composition_order_and_linearity():
    blur, small = GaussianBlur(1), SuperResolution(2)
    x = images()
    assert torch.equal(Composition(blur, small)(x), small(blur(x)))
    assert isinstance(Composition(blur, small), LinearOperator)
    assert not isinstance(Composition(blur, HDR()), LinearOperator)
    black_box = HDR()
    black_box.differentiable = False
    assert not Composition(blur, black_box).differentiable


def test_conjugate_gradient_freezes_what_has_converged():
    matrix = normal(6, 6)
    matrix = matrix @ matrix.T + torch.eye(6)
    rhs = normal(3, 6)
    rhs[1] = 0
    together = conjugate_gradient(lambda v: v @ matrix, rhs)
    assert torch.allclose(together, torch.linalg.solve(matrix, rhs.T).T, atol=1e-5)
    assert torch.equal(conjugate_gradient(lambda v: v @ matrix, rhs[1:2]), together[1:2])
    tiny = conjugate_gradient(lambda v: 1e-20 * (v @ matrix), 1e-20 * rhs)
    assert torch.allclose(tiny, together, atol=1e-5)


# ---- bad input


MASK = torch.ones(1, 8, 8)
HOLE = MASK.clone()
HOLE[0, 2, 3] = 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GaussianBlur(0),
            "sigma is 0; expected a number of pixels above 0 and at most 1000",
        ),
        (lambda: GaussianBlur(1, "refect"), "padding is 'refect'; did you mean 'reflect'"),  # pyright: ignore[reportArgumentType]
        (lambda: GaussianBlur(1, "valid")(torch.zeros(1, 3, 4, 20)), "4 x 20 pixels; it needs at"),
        (lambda: GaussianBlur(1)(torch.zeros(3, 8, 8)), "add the batch axis with x\\[None\\]"),
        (lambda: GaussianBlur(1)(torch.zeros(1, 3, 8, 8).byte()), "torch.uint8 values; expected"),
        (lambda: Blur(torch.ones(2, 3) / 6), "even size 2 x 3"),
        (lambda: Blur(torch.ones(1, 3, 3) / 9), "shape \\(1, 3, 3\\); expected two axes"),
        (lambda: Blur(torch.tensor([[-1.0, 0.0, 1.0]])), "sums to 0"),
        (lambda: Blur(torch.full((3, 3), torch.nan)), "sums to nan"),
        (lambda: Blur(torch.ones(9, 3) / 27)(torch.zeros(1, 3, 8, 8)), "at least 9 x 3"),
        (lambda: MotionBlur(1), "length is 1; expected a number of pixels above 1"),
        (lambda: MotionBlur(12, 0)(torch.zeros(1, 3, 8, 8)), "8 x 8 pixels; it needs at least"),
        (lambda: Inpainting(MASK), "every pixel as known.*use Identity"),
        (lambda: Inpainting(0 * MASK), "no pixel as known.*inverted"),
        (lambda: Inpainting(0.5 * MASK), "threshold it"),
        (lambda: Inpainting(HOLE[None]), "mask has shape \\(1, 1, 8, 8\\)"),
        (
            lambda: Inpainting(HOLE)(torch.zeros(1, 3, 8, 9)),
            "\\(1, 8, 8\\) and the images \\(3, 8, 9\\)",
        ),
        (lambda: Inpainting.random((3, 8, 8), 1.0), "fraction_missing=1.0"),
        (lambda: Inpainting.box((3, 8, 8), 4, 4, top=6), "rows 6 to 10; the image has 0 to 8"),
        (lambda: SuperResolution(1), "factor is 1; expected a whole number from 2 to 1000"),
        (lambda: SuperResolution(2, "bicubc"), "did you mean 'bicubic'"),  # pyright: ignore[reportArgumentType]
        (lambda: Grayscale()(torch.zeros(1, 1, 8, 8)), "expected 3 channels"),
        (lambda: JPEG(0), "quality is 0; expected a number from 1 to 100"),
        (lambda: JPEG(50)(torch.zeros(1, 2, 8, 8)), "expected 3 channels"),
        (lambda: HDR(gain=-1), "gain is -1; expected a finite number above 0"),
        (lambda: Composition(), "no operators"),
        (lambda: Composition(torch.sin), "no Operator; pass as_operator"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_kernel_that_does_not_sum_to_one_is_divided_with_a_warning():
    with pytest.warns(UserWarning, match="summed to 9 and was divided"):
        operator = Blur(torch.ones(3, 3))
    assert torch.allclose(operator.kernel.sum(), torch.ones(()))


def test_random_mask_drops_the_fraction():
    mask = Inpainting.random((3, 20, 30), 0.3, seed=1).mask
    assert mask.shape == (1, 20, 30)
    assert (~mask).sum() == 180
    assert torch.equal(mask, Inpainting.random((20, 30), 0.3, seed=1).mask)
    assert not torch.equal(mask, Inpainting.random((20, 30), 0.3, seed=2).mask)


def test_operators_import_light():
    code = (
        "import sys, invguide.operators, invguide.adapters.operators, invguide.diagnostics.operator;"
        "print([m for m in ('deepinv', 'kornia', 'scipy') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
