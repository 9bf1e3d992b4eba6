"""Tiles against the whole image: equal where the denoiser looks no farther than the overlap allows."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import invguide as ig
from invguide.engine.run_identity import describe_prior
from invguide.errors import InputError, ShapeError
from invguide.numerics.linear import per_sample
from invguide.operators import GaussianBlur
from invguide.prior import Prior
from invguide.priors import Gaussian, Padded, Tiled, from_network
from invguide.priors.wrappers import tiled as module
from invguide.priors.wrappers.tiled import cuts
from invguide.solvers import DPS
from invguide.system.memory import peak_memory


class Local(Prior):
    """A nonlinear denoiser of float64 that looks `radius` pixels far, for images of any size or of one."""

    def __init__(self, radius: int = 4, size: int | None = None) -> None:
        super().__init__()
        self.shape = (1, size, size)
        self.sigma_min, self.sigma_max = 0.01, 40.0
        width = 2 * radius + 1
        kernel = torch.randn(1, 1, width, width, generator=torch.Generator().manual_seed(1))
        self.register_buffer("kernel", kernel.double() / width)

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        assert self.shape[1] in (None, x.shape[-1])
        gain = condition.get("gain", torch.ones(len(x), dtype=x.dtype))
        wide = F.conv2d(x, self.kernel, padding="same")  # pyright: ignore[reportArgumentType]
        out = per_sample(gain, x) * torch.tanh(wide) / (1 + per_sample(sigma, x))
        return out * condition.get("mask", torch.ones((), dtype=x.dtype))


def image(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def vjp(prior: Prior, x: Tensor, sigma: Tensor | float, cotangent: Tensor, **condition: Tensor):
    x = x.clone().requires_grad_()
    denoised = prior.denoise(x, sigma, **condition)
    return denoised.detach(), torch.autograd.grad(denoised, x, cotangent)[0]


# ---- where tiles lie, and what they weigh


@pytest.mark.parametrize("multiple", [1, 8])
def test_weights_are_a_partition_of_unity(multiple: int) -> None:
    for size, tile, overlap in product((64, 72, 104, 200, 1024), (32, 64), (0, 8, 16)):
        found = cuts(size, tile, overlap, multiple)
        total, margin = torch.zeros(size, dtype=torch.float64), overlap // 4
        for cut in found:
            assert cut.part.start >= 0
            assert cut.part.stop <= size
            assert cut.part.stop - cut.part.start == tile
            assert cut.part.start % multiple == 0
            assert bool((cut.weight >= -1e-15).all())
            total[cut.part] += cut.weight
            if cut.part.start > 0:
                assert not cut.weight[:margin].any()
            if cut.part.stop < size:
                assert not cut.weight[tile - margin :].any()
        assert torch.allclose(total, torch.ones(size, dtype=torch.float64), atol=1e-14)
        for left, right in pairwise(found):
            assert left.part.stop - right.part.start >= overlap


# ---- a denoiser that looks 4 pixels far


@pytest.mark.parametrize(
    ("size", "fixed"),
    [((64, 64), 48), ((90, 121), None), ((90, 121), 48), ((65, 40), None), ((33, 200), None)],
)
def test_equals_the_whole_image_forwards_and_backwards(
    size: tuple[int, int], fixed: int | None
) -> None:
    whole, tiled = Local(), Tiled(Local(size=fixed), None if fixed else 48, overlap=16)
    x, cotangent = image(2, 1, *size), image(2, 1, *size, seed=1)
    sigma = torch.tensor([0.3, 2.0], dtype=torch.float64)
    expected, actual = vjp(whole, x, sigma, cotangent), vjp(tiled, x, sigma, cotangent)
    for a, b in zip(actual, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("mistake", ["short overlap", "no weights", "shifted"])
def test_a_seam_would_be_noticed(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, cotangent = image(1, 1, 90, 120), image(1, 1, 90, 120, seed=1)
    overlap = 8 if mistake == "short overlap" else 16
    if mistake == "no weights":
        monkeypatch.setattr(module, "_outer", lambda w: torch.ones(len(w[0]), len(w[1])))
    if mistake == "shifted":
        right = module._outer
        monkeypatch.setattr(module, "_outer", lambda w: right([w[0].roll(1), w[1]]))
    expected = vjp(Local(), x, 0.5, cotangent)
    actual = vjp(Tiled(Local(), 48, overlap=overlap), x, 0.5, cotangent)
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() > 1e-6


def test_conditions_are_passed_on_and_images_among_them_are_cut() -> None:
    x, cotangent = image(2, 1, 70, 90), image(2, 1, 70, 90, seed=1)
    condition = {"gain": image(2, seed=2), "mask": image(2, 1, 70, 90, seed=3)}
    expected = vjp(Local(), x, 0.5, cotangent, **condition)
    for prior in (Tiled(Local(), 40, overlap=16), Tiled(Local(size=40), overlap=16)):
        for a, b in zip(vjp(prior, x, 0.5, cotangent, **condition), expected, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-13)


def test_rows_are_independent_and_tiles_may_share_a_call() -> None:
    x, cotangent = image(3, 1, 70, 90), image(3, 1, 70, 90, seed=1)
    sigma = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    alone = [
        vjp(Tiled(Local(), 40, overlap=16), x[i, None], sigma[i], cotangent[i, None])
        for i in range(3)
    ]
    for count in (1, 4, 100):
        together = vjp(Tiled(Local(), 40, overlap=16, batch_size=count), x, sigma, cotangent)
        for k in (0, 1):
            parts = torch.cat([result[k] for result in alone])
            assert torch.allclose(together[k], parts, rtol=0, atol=1e-14)


def test_a_float_level_is_not_rounded() -> None:
    # 0.3 in float32 differs from 0.3 by 1e-8.
    expected = Local().denoise(image(1, 1, 70, 90), torch.tensor(0.3, dtype=torch.float64))
    actual = Tiled(Local(), 40, overlap=16).denoise(image(1, 1, 70, 90), 0.3)
    assert torch.allclose(actual, expected, rtol=0, atol=1e-13)


# ---- the embedded network


def test_vjp_of_the_network_is_that_of_the_blend() -> None:
    """Against automatic differentiation of the blend, written out with nothing but slices."""
    prior = ig.load_prior("natural-tiny")
    tiled = Tiled(prior, 48, overlap=16)
    x = image(1, 3, 60, 71).float()
    x.requires_grad_()
    padded = F.pad(x, (0, 1, 0, 4), mode="reflect")
    assert padded.shape[2:] == (64, 72)
    blend = torch.zeros_like(padded)
    # Two tiles of 40 and 48: the smallest that cover 64 and 72 with an overlap of 16 and starts at multiples of 8.
    for rows, columns in product(cuts(64, 40, 16, 8), cuts(72, 48, 16, 8)):
        weight = (rows.weight[:, None] * columns.weight).float()
        part = prior.denoise(padded[:, :, rows.part, columns.part], 0.5)
        beyond = (columns.part.start, 72 - columns.part.stop)
        blend = blend + F.pad(weight * part, (*beyond, rows.part.start, 64 - rows.part.stop))
    blend = blend[:, :, :60, :71]
    cotangent = image(1, 3, 60, 71, seed=1).float()
    (expected,) = torch.autograd.grad(blend, x, cotangent)
    denoised, gradient = vjp(tiled, x.detach(), 0.5, cotangent)
    assert torch.allclose(denoised, blend, rtol=0, atol=1e-6)
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_small_image_is_one_call_and_keeps_its_graph() -> None:
    calls = []
    net = nn.Conv2d(1, 1, 3, padding=1).double()
    net.register_forward_hook(lambda *_: calls.append(1))
    inside = from_network(lambda x, t: net(x), predicts="x0", schedule="ve", shape=(1, None, None))
    x, cotangent = image(1, 1, 40, 44), image(1, 1, 40, 44)
    expected = vjp(inside, x, 0.5, cotangent)
    calls.clear()
    actual = vjp(Tiled(inside, 48), x, 0.5, cotangent)
    assert len(calls) == 1
    assert torch.equal(actual[1], expected[1])


@pytest.mark.slow
def test_memory_is_that_of_a_tile() -> None:
    prior = ig.load_prior("natural-tiny")

    def peak(which: Prior, size: int) -> int:
        x, cotangent = torch.zeros(1, 3, size, size), torch.ones(1, 3, size, size)
        return peak_memory(lambda: vjp(which, x, 0.5, cotangent), torch.device("cpu"))

    one_tile = peak(prior, 48)
    image_bytes = 4 * 3 * 128 * 128
    # Copies of the image and its gradients come on top, and nothing else.
    assert peak(Tiled(prior, 48, overlap=16), 128) < 1.1 * one_tile + 6 * image_bytes
    assert peak(prior, 128) > 4 * one_tile


def test_solvers_run_on_tiles() -> None:
    """DPS on tiles is DPS on the whole image, step by step and to the end."""
    operator = GaussianBlur(sigma=1.0)
    y = image(1, 1, 60, 70)
    run = {"sigma_y": 0.1, "solver": DPS(num_steps=4), "num_samples": 2, "progress": False}
    whole = ig.solve(y, operator, Local(), device="cpu", **run)
    tiled = ig.solve(y, operator, Tiled(Local(), 40, overlap=16), device="cpu", **run)
    assert torch.allclose(tiled.samples, whole.samples, rtol=0, atol=1e-10)
    assert tiled.nfe == whole.nfe


def test_tiles_are_part_of_what_a_checkpoint_is_bound_to() -> None:
    described = {describe_prior(Tiled(Local(), *size)) for size in ((32, 8), (48, 8), (48, 16))}
    assert len(described) == 3


# ---- padding


@pytest.mark.parametrize("size", [(16, 24), (13, 18), (3, 5)])
def test_padded_to_a_multiple(size: tuple[int, int]) -> None:
    seen = []

    class Inside(Local):
        def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
            seen.append((x, condition["mask"]))
            return super().denoise(x, sigma, **condition)

    x, mask = image(2, 1, *size), image(2, 1, *size, seed=1)
    denoised = Padded(Inside(), multiple=8).denoise(x, 0.5, mask=mask)
    assert denoised.shape == x.shape
    for whole, part in zip(seen[0], (x, mask), strict=True):
        assert all(n % 8 == 0 and n - 8 < m <= n for n, m in zip(whole.shape[2:], size))
        assert torch.equal(whole[..., : size[0], : size[1]], part)
    if size == (13, 18):  # reflected: no sample of the edge twice
        assert torch.equal(seen[0][0][:, :, 13:, :18], x[:, :, [11, 10, 9]])


def test_padded_to_the_only_size_of_a_prior() -> None:
    x = image(1, 1, 30, 25)
    prior = Padded(Local(size=32))
    assert prior.shape == (1, None, None)
    expected = Local().denoise(F.pad(x, (0, 7, 0, 2), mode="reflect"), 0.5)[..., :30, :25]
    assert torch.allclose(prior.denoise(x, 0.5), expected)
    assert torch.allclose(Tiled(Local(size=32)).denoise(x, 0.5), expected)
    with pytest.raises(ShapeError, match=r"larger than the .* use priors\.Tiled"):
        prior.denoise(image(1, 1, 30, 33), 0.5)


# ---- what is inside stays as it is


def test_wrappers_have_the_units_and_the_speed_of_the_prior_inside() -> None:
    prior = ig.load_prior("natural-tiny")
    for wrapped in (Tiled(prior), Padded(prior)):
        for name in ("sigma_min", "sigma_max", "scale", "shift", "symmetric", "sigma_data"):
            assert getattr(wrapped, name) == getattr(prior, name)
        assert wrapped.optimise("bf16") is wrapped
        assert (wrapped.precision, prior.precision) == ("bf16", "bf16")
        prior.optimise("fp32")


def test_wrappers_decode_as_the_prior_inside() -> None:
    """As of a latent prior: twice as many pixels, by a map that is not affine."""

    class Decoded(Local):
        affine = False

        def to_data(self, x: Tensor) -> Tensor:
            return torch.tanh(x).repeat_interleave(2, -1).repeat_interleave(2, -2)

        def to_normalised(self, x: Tensor) -> Tensor:
            return torch.atanh(x[..., ::2, ::2])

        def data_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
            return (shape[0], 2 * shape[1], 2 * shape[2])

        def normalised_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
            return (shape[0], shape[1] // 2, shape[2] // 2)

    y = image(1, 1, 120, 140).tanh()
    run = {"sigma_y": 0.5, "solver": DPS(num_steps=3), "device": "cpu", "progress": False}
    whole = ig.solve(y, GaussianBlur(sigma=1.0), Decoded(), **run)
    for prior in (Tiled(Decoded(), 40, overlap=16), Padded(Decoded(), multiple=1)):
        tiled = ig.solve(y, GaussianBlur(sigma=1.0), prior, **run)
        assert torch.allclose(tiled.samples, whole.samples, rtol=0, atol=1e-10)
        x = image(1, 1, 60, 70)
        assert torch.allclose(prior.to_normalised(prior.to_data(x)), x)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Tiled(Local(size=64), 32), "tile is 32, and the prior inside takes"),
        (lambda: Tiled(Local(), 32, 20), "overlap is 20; expected at most half the tile, 16"),
        (lambda: Tiled(Local(), 32, -1), "overlap is -1"),
        (lambda: Tiled(Local(), 32, batch_size=0), "batch_size is 0"),
        (lambda: Tiled(ig.load_prior("natural-tiny"), 60), "tile is 60; expected a multiple of 8"),
        (lambda: Tiled(ig.load_prior("natural-tiny"), 64, 12), "overlap is 12; expected a mult"),
        (lambda: Tiled(Gaussian(torch.zeros(2), torch.eye(2))), "Tiled is for images"),
        (lambda: Padded(Local(), 0), "multiple is 0"),
        (lambda: Tiled(Local()).denoise(image(1, 2, 9, 9), 1.0), r"\(B, 1, any, any\), got"),
    ],
)
def test_errors(make, match: str) -> None:
    with pytest.raises(InputError, match=match):
        make()
