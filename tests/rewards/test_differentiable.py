"""Differentiable rewards: loops, numpy, limits and central differences as oracles; every planted fault is found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

import invguide as ig
from invguide.errors import InputError, ShapeError
from invguide.problem.problem import Problem
from invguide.reward import Reward
from invguide.rewards import (
    ClassLogProb,
    Colourfulness,
    ColourHistogram,
    FileSize,
    Palette,
    Perceptual,
    Preprocess,
    SegmentationAgreement,
    SoftPalette,
    Style,
    TotalVariation,
)

SHAPE = (3, 6, 5)


def images(count: int = 3, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(count, *shape, dtype=torch.float64)


def classifier(classes: int = 5, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A small network in training mode, whose batch normalisation would couple rows."""
    body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.Flatten())
    return nn.Sequential(body, nn.LazyLinear(classes)).to(dtype).train()


class Layers(nn.Module):
    """Two layers of smooth features of different size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3).double(), nn.Conv2d(4, 5, 2, 2).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.tanh(self.first(x))
        return a, torch.sin(2 * self.second(a))


def shipped() -> Sequence[Reward]:
    torch.manual_seed(1)
    reference, labels = torch.rand(SHAPE), torch.randint(0, 4, SHAPE[1:])
    network = classifier()
    network(images())  # LazyLinear learns its size
    return [
        ClassLogProb(network, 2, temperature=1.5, transform=Preprocess((0.5,) * 3, (0.3,) * 3)),
        ClassLogProb(network, (0, 3), marginal=0.5),
        SegmentationAgreement(nn.Conv2d(3, 4, 3).double(), labels, ignore_index=1),
        ColourHistogram(reference, bins=7),
        SoftPalette([(0, 0, 0), (1, 0.2, 0.1), (0.3, 0.4, 0.9)]),
        Style(Layers(), reference, weights=(1, 0.3)),
        Perceptual(Layers(), reference),
        Perceptual(Layers(), reference, normalise=True, transform=Preprocess(size=9)),
        TotalVariation(),
        Colourfulness(),
        Colourfulness(target=0.2),
    ]


REWARDS = shipped()
NAMES = [f"{i} {type(reward).__name__}" for i, reward in enumerate(REWARDS)]
every_reward = pytest.mark.parametrize("reward", REWARDS, ids=NAMES)


# ---- the contract


@every_reward
def test_gradients_are_central_differences(reward: Reward):
    # The whole Jacobian, (N,) by (N, *shape).
    x = images(2).requires_grad_()
    assert torch.autograd.gradcheck(reward, x, eps=1e-6, atol=1e-7, rtol=1e-5)


@every_reward
def test_rows_input_dtype_and_device(reward: Reward, device: torch.device):
    x = images(4).to(device)
    before, scores = x.clone(), reward(x)
    assert torch.equal(x, before)
    assert (scores.shape, scores.dtype, scores.device) == ((4,), x.dtype, x.device)
    alone = torch.cat([reward(row[None]) for row in x])
    torch.testing.assert_close(scores, alone, rtol=1e-11, atol=1e-12)
    x[1, 0, 2, 3] = math.nan
    expected = scores.clone()
    expected[1] = math.nan
    torch.testing.assert_close(reward(x), expected, equal_nan=True, rtol=1e-11, atol=1e-12)
    assert reward(x.float()).dtype == torch.float32


@every_reward
def test_check_passes(reward: Reward):
    certificate = reward.check(SHAPE, quiet=True)
    assert certificate.ok, str(certificate)
    assert certificate["differentiable"].verdict == "ok"
    assert reward.differentiable


def test_a_weighted_sum_of_all(device: torch.device):
    weights = [0.3 * (i + 1) * (-1) ** i for i in range(len(REWARDS))]
    total = sum(w * r for w, r in zip(weights, REWARDS))
    assert isinstance(total, Reward)
    x = images().to(device).requires_grad_()
    expected = torch.stack([w * r(x) for w, r in zip(weights, REWARDS)]).sum(0)
    torch.testing.assert_close(total(x), expected)
    gradient = torch.autograd.grad(total(x).sum(), x)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), x)[0])
    assert total.differentiable
    assert total.check(SHAPE, quiet=True).ok
    assert not (total + 0.1 * FileSize()).differentiable


def test_the_parts_of_a_sum_may_run_in_different_precision():
    single = ClassLogProb(nn.Sequential(nn.Flatten(), nn.Linear(90, 3)), 1)
    x = images()
    assert single(x).dtype == torch.float64
    torch.testing.assert_close(single(x), single(x.float()).double())
    assert (0.3 * single + TotalVariation()).check(SHAPE, quiet=True).ok
    half = ClassLogProb(nn.Sequential(nn.Flatten(), nn.Linear(90, 3)).bfloat16(), 1)
    assert half(x.float()).dtype == torch.float32


@pytest.mark.parametrize("reward", [r for r in REWARDS if "=" in repr(r)], ids=repr)
def test_reprs_are_short_and_without_addresses(reward: Reward):
    assert " at 0x" not in repr(reward)
    assert "\n" not in repr(reward)
    assert len(repr(reward)) < 250


def test_reprs_name_the_values_of_tensors():
    # A checkpoint is resumed in another process, with the same reference only: hence a hash that is a literal here.
    reference = torch.arange(108.0).reshape(3, 6, 6) / 108
    total = Style(nn.Conv2d(3, 4, 3), reference, (2,)) + ClassLogProb(lambda x: x, 3)
    assert repr(total) == (
        "Style(features=Conv2d, reference=<3x6x6 9255374ac4b654df>, weights=(2.0,), transform=None) + "
        "ClassLogProb(classifier=<lambda>, label=3, temperature=1.0, marginal=1.0, transform=None)"
    )
    assert repr(ColourHistogram(reference)) == repr(ColourHistogram(reference.clone()))
    assert repr(ColourHistogram(reference)) != repr(ColourHistogram(reference / 2))


# ---- the user's network


def test_the_network_is_used_as_it_is(device: torch.device):
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(90, 4)).double().train()
    network[2].bias.requires_grad_(False)
    weights = {k: v.clone() for k, v in network.state_dict().items()}
    reward, x = ClassLogProb(network, 1), images().to(device).requires_grad_()
    torch.autograd.grad(reward(x).sum(), x)
    assert next(network.parameters()).device.type == device.type
    assert network.training, "left as it was found"
    assert all(torch.equal(v.cpu(), weights[k]) for k, v in network.state_dict().items())
    assert [p.requires_grad for p in network.parameters()] == [True, True, True, False]
    assert all(p.grad is None for p in network.parameters())


def test_a_network_that_works_in_place_does_not_change_x():
    reward = ClassLogProb(nn.Sequential(nn.ReLU(inplace=True), nn.Flatten()), 1)
    x = images() - 0.5
    before = x.clone()
    torch.autograd.grad(reward(x.requires_grad_()).sum(), x)
    assert torch.equal(x, before)
    assert not reward.changes_input(x.detach())


def test_the_reference_follows_x_and_the_weights(device: torch.device):
    reward = Style(Layers(), torch.rand(SHAPE))
    assert reward(reward.reference[None].double().to(device)).abs().item() < 1e-15
    assert reward.network.get_buffer("wanted_1").device.type == device.type


def test_solvers_see_the_reward_in_data_units():
    prior = ig.priors.GaussianField((3, 4, 4))
    prior.scale, prior.shift = 0.5, 0.5
    x0 = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    log_prob, _, gradient = Problem(prior, reward=-2 * TotalVariation()).gradient(x0)
    torch.testing.assert_close(log_prob, -2 * TotalVariation()(0.5 * x0 + 0.5))
    assert gradient.shape == x0.shape
    assert bool(gradient.any())


def test_preprocess_is_torchvisions_by_hand():
    x = images()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = np.stack([(x.numpy()[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    np.testing.assert_allclose(Preprocess.imagenet(None)(x).numpy(), expected, rtol=1e-12)
    grey = Preprocess.imagenet(None)(x[:, :1])
    np.testing.assert_allclose(grey[:, 2].numpy(), (x.numpy()[:, 0] - mean[2]) / std[2])
    # A quarter of the size: a ramp stays one, and stripes that two samples per pixel would miss become grey.
    ramp, stripes = torch.arange(32.0), torch.tensor([0.0, 1.0, 1.0, 0.0]).repeat(8)
    small = Preprocess(size=(8, 8))(
        torch.stack([ramp, stripes])[None, :, None].expand(1, 2, 32, 32)
    )
    torch.testing.assert_close(small[0, 0, 0, 2:6], 4 * torch.arange(2.0, 6.0) + 1.5)
    torch.testing.assert_close(small[0, 1, 0, 2:6], torch.full((4,), 0.5))
    assert Preprocess(size=(4, 7))(x).shape == (3, 3, 4, 7)


# ---- classifiers


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_class_log_prob_is_the_log_of_a_softmax(temperature: float):
    x, weight = images(), torch.randn(4, 90, dtype=torch.float64)
    reward = ClassLogProb(lambda x: x.flatten(1) @ weight.T, 2, temperature=temperature)
    for row, score in zip(x, reward(x)):
        powers = [math.exp((weight[k] @ row.flatten()).item() / temperature) for k in range(4)]
        assert score.item() == pytest.approx(math.log(powers[2] / sum(powers)), rel=1e-12)


def test_several_labels_are_any_of_them():
    network = nn.Sequential(nn.Flatten(), nn.Linear(90, 5)).double()
    x = images()
    single = [ClassLogProb(network, k)(x).exp() for k in range(5)]
    torch.testing.assert_close(ClassLogProb(network, [3, 0, 3])(x).exp(), single[0] + single[3])
    torch.testing.assert_close(ClassLogProb(network, range(5)[1])(x).exp(), single[1])
    every = ClassLogProb(network, (0, 1, 2, 3, 4))(x)
    torch.testing.assert_close(every, torch.zeros_like(every), atol=1e-12, rtol=0)
    assert ClassLogProb(network, torch.tensor(3)).label == 3


def test_the_temperatures_of_elucd():
    network = nn.Sequential(nn.Flatten(), nn.Linear(90, 5)).double()
    x = images()
    logits = network(x)
    for joint, marginal in [(1.0, 0.5), (0.7, 0.0), (2.0, 2.0)]:  # their t1 and t2
        expected = joint * logits[:, 2] - torch.log(torch.exp(marginal * logits).sum(1))
        reward = ClassLogProb(network, 2, temperature=1 / joint, marginal=marginal / joint)
        torch.testing.assert_close(reward(x), expected)


def test_log_probabilities_keep_their_digits():
    def sure(x: Tensor) -> Tensor:
        return torch.tensor([[1000.0, 988.0]]).expand(len(x), 2) + 0 * x.flatten(1)[:, :2]

    x = images().float()
    assert ClassLogProb(sure, 0)(x)[0].item() == pytest.approx(-math.exp(-12), rel=1e-2)
    assert ClassLogProb(sure, 1)(x)[0].item() == pytest.approx(-12, rel=1e-6)


# ---- segmentation


@pytest.mark.parametrize("ignore_index", [None, 1])
def test_segmentation_agreement_is_a_mean_over_pixels(ignore_index: int | None):
    x, labels = images(2), torch.randint(0, 3, SHAPE[1:])
    logits = 4 * x.numpy()
    expected = []
    for z in logits:
        scores = [
            z[k, i, j] - math.log(sum(math.exp(z[c, i, j]) for c in range(3)))
            for i in range(6)
            for j in range(5)
            if (k := int(labels[i, j])) != ignore_index
        ]
        expected.append(np.mean(scores))
    reward = SegmentationAgreement(lambda x: 4 * x, labels, ignore_index)
    np.testing.assert_allclose(reward(x).numpy(), expected, rtol=1e-12)


def test_segmenters_of_all_sorts():
    x, labels = images(), torch.rand(SHAPE[1:]) > 0.5
    two = SegmentationAgreement(lambda x: {"out": x[:, :2]}, labels)(x)
    torch.testing.assert_close(
        SegmentationAgreement(lambda x: {"logits": x[:, :2]}, labels.long())(x), two
    )
    ignored = labels.long()
    ignored[0] = 255
    noisy_there = x.clone()
    noisy_there[:, :, 0] = 9
    reward = SegmentationAgreement(lambda x: x, ignored, ignore_index=255)
    torch.testing.assert_close(reward(x), reward(noisy_there))
    # Logits at half size are interpolated: constant ones stay what they are.
    flat = SegmentationAgreement(
        lambda x: torch.ones_like(x[:, :, ::2, ::2]) + 0 * x.mean(), labels
    )
    torch.testing.assert_close(flat(x), torch.full_like(flat(x), -math.log(3)))


# ---- colours


def test_a_narrow_soft_histogram_is_that_of_numpy():
    x, reference = images(2, (3, 9, 11)), torch.rand(3, 20, 14, dtype=torch.float64)
    x, reference = 1.6 * x - 0.3, 1.2 * reference - 0.1  # beyond [0, 1] too
    expected = []
    for picture in x.numpy():
        distances = []
        for channel, wanted in zip(picture, reference.numpy()):
            a, b = (
                np.histogram(v.clip(0, 1), bins=8, range=(0, 1))[0] / v.size
                for v in (channel, wanted)
            )
            distances.append(np.abs(np.cumsum(a - b)).sum() / 8)
        expected.append(-np.mean(distances))
    reward = ColourHistogram(reference, bins=8, bandwidth=1e-3)
    np.testing.assert_allclose(reward(x).numpy(), expected, rtol=1e-9)
    given = ColourHistogram(reward.wanted, bandwidth=1e-3)
    assert given.bins == 8
    torch.testing.assert_close(given(x), reward(x))


def test_with_fine_bins_the_distance_is_that_of_sorted_pixels():
    x, reference = images(3, (1, 16, 16)), images(1, (1, 16, 16))[0] ** 2
    # Wasserstein-1 of samples of equal size, exactly
    expected = -(x.flatten(1).sort().values - reference.flatten().sort().values).abs().mean(1)
    assert bool((expected < -0.1).all())
    scores = ColourHistogram(reference, bins=200)(x)
    torch.testing.assert_close(scores, expected, atol=0.5 / 200, rtol=0)  # half a bin


def test_the_histogram_gradient_knows_the_way():
    x = torch.full((1, 1, 4, 4), 0.3, dtype=torch.float64).requires_grad_()
    score = ColourHistogram(torch.full((1, 4, 4), 0.7))(x)
    (gradient,) = torch.autograd.grad(score, x)
    # Moving all pixels by delta changes the distance by delta, and the sum of the slopes says so.
    assert gradient.sum().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_soft_palette_lies_between_nearest_and_mean(channels: int):
    colours, x = images(4, (channels,)), images(2, (channels, 5, 4))
    distances = (x[:, None] - colours[None, :, :, None, None]).norm(dim=2)
    sharp, mean = Palette(colours)(x), -distances.mean((1, 2, 3))
    torch.testing.assert_close(SoftPalette(colours, 1e-4)(x), sharp, atol=1e-4 * 1.4, rtol=0)
    torch.testing.assert_close(SoftPalette(colours, 1e4)(x), mean, atol=1e-4, rtol=0)
    between = SoftPalette(colours)(x)
    assert bool((sharp > between).all())
    assert bool((between > mean).all())
    assert SoftPalette(colours) == SoftPalette(colours.tolist())


def test_colourfulness_is_that_of_hasler_and_suesstrunk():
    x = images(4)
    expected = []
    for r, g, b in x.numpy():
        rg, yb = r - g, 0.5 * (r + g) - b
        spread = np.sqrt(np.std(rg) ** 2 + np.std(yb) ** 2)
        expected.append(spread + 0.3 * np.sqrt(np.mean(rg) ** 2 + np.mean(yb) ** 2))
    np.testing.assert_allclose(Colourfulness()(x).numpy(), expected, rtol=1e-12)
    aimed = Colourfulness(target=0.4)(x).numpy()
    np.testing.assert_allclose(aimed, -np.abs(np.array(expected) - 0.4), rtol=1e-12)
    assert Colourfulness()(x[:, :1].expand(4, 3, 6, 5)).abs().max() == 0


def test_total_variation_is_that_of_numpy():
    x = images(4)
    expected = [
        -(np.abs(np.diff(row, axis=1)).mean() + np.abs(np.diff(row, axis=2)).mean())
        for row in x.numpy()
    ]
    np.testing.assert_allclose(TotalVariation()(x).numpy(), expected, rtol=1e-12)
    stripes = torch.tensor([0.0, 1.0]).repeat(8).expand(1, 1, 16, 16)
    assert TotalVariation()(stripes).item() == -1


@pytest.mark.parametrize(
    "reward",
    [
        Colourfulness(),
        Colourfulness(0.3),
        SoftPalette([(0.5, 0.5, 0.5), (1, 1, 1)]),
        TotalVariation(),
        ColourHistogram(torch.full(SHAPE, 0.5)),
        Perceptual(lambda x: x - 0.5, torch.full(SHAPE, 0.5), normalise=True),
        Style(lambda x: x - 0.5, torch.full(SHAPE, 0.5)),
    ],
    ids=lambda r: type(r).__name__,
)
def test_gradients_of_a_flat_grey_picture_are_finite(reward: Reward):
    x = torch.full((2, *SHAPE), 0.5, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x).sum(), x)
    assert bool(torch.isfinite(gradient).all())


# ---- features


@torch.no_grad()
def gram_by_loops(features: Tensor) -> np.ndarray:
    f = features.detach().flatten(1).numpy()  # (C, P)
    gram = np.zeros((len(f), len(f)))
    for i in range(len(f)):
        for j in range(len(f)):
            gram[i, j] = sum(a * b for a, b in zip(f[i], f[j])) / f.shape[1]
    return gram


@pytest.mark.parametrize("weights", [None, (2.0, 0.25)])
def test_style_is_a_distance_of_gram_matrices(weights: tuple[float, float] | None):
    layers, x, reference = Layers(), images(2), images(1, (3, 8, 9))[0]  # another size
    expected = []
    for row in x:
        distances = [
            ((gram_by_loops(a[0]) - gram_by_loops(b[0])) ** 2).mean()
            for a, b in zip(layers(row[None]), layers(reference[None]))
        ]
        expected.append(-np.dot(weights or (0.5, 0.5), distances))
    np.testing.assert_allclose(Style(layers, reference, weights)(x).numpy(), expected, rtol=1e-10)


def test_style_does_not_see_where_textures_lie():
    x, reference = images(2), images(1)[0]
    style = Style(lambda x: x, reference)
    shuffled = x.flatten(2)[:, :, torch.randperm(30)].reshape(x.shape)
    torch.testing.assert_close(style(shuffled), style(x))
    assert not torch.allclose(Perceptual(lambda x: x, reference)(shuffled), style(x))


@pytest.mark.parametrize("weights", [None, (2.0, 0.25)])
@pytest.mark.parametrize("normalise", [False, True])
def test_perceptual_is_a_distance_of_features(
    weights: tuple[float, float] | None, normalise: bool
):
    layers, x, reference = Layers(), images(2), images(1)[0]
    expected = []
    for row in x:
        distances = []
        for a, b in zip(layers(row[None]), layers(reference[None])):
            a, b = a[0].detach().flatten(1).numpy(), b[0].detach().flatten(1).numpy()
            cosines = (a * b).sum(0) / np.linalg.norm(a, axis=0) / np.linalg.norm(b, axis=0)
            distances.append((2 - 2 * cosines).mean() if normalise else ((a - b) ** 2).mean())
        expected.append(-np.dot(weights or (0.5, 0.5), distances))
    reward = Perceptual(layers, reference, weights, normalise=normalise)
    # 1e-8 under a root beside features of about 0.3 changes them by 1e-7
    np.testing.assert_allclose(reward(x).numpy(), expected, rtol=1e-5 if normalise else 1e-10)


def test_features_of_all_sorts():
    x, reference = images(), images(1)[0]
    one = Perceptual(lambda x: x.square(), reference)(x)
    for several in (lambda x: [x.square()], lambda x: {"a": x.square()}):
        torch.testing.assert_close(Perceptual(several, reference)(x), one)
    embedding = Perceptual(lambda x: x.mean((2, 3)), reference)
    expected = -(x.mean((2, 3)) - reference.mean((1, 2))).square().mean(1)
    torch.testing.assert_close(embedding(x), expected)
    # A transform that brings both to one size lets pictures of different size be compared.
    resized = Perceptual(lambda x: x, torch.rand(3, 12, 10), transform=Preprocess(size=(6, 5)))
    assert resized(x).shape == (3,)
    array = Perceptual(lambda x: x.square(), reference.numpy())
    torch.testing.assert_close(array(x), one)


# ---- planted faults


def failed(reward: Reward) -> set[str]:
    return {r.name for r in reward.check(SHAPE, quiet=True).rows if r.verdict == "FAILS"}


def test_training_mode_is_found(monkeypatch: pytest.MonkeyPatch):
    network = classifier().train()
    network(images())
    monkeypatch.setattr("invguide.rewards.network_reward.evaluating", lambda _: nullcontext())
    assert "rows independent" in failed(ClassLogProb(network, 2))


def test_a_network_without_gradient_is_found():
    reward = ClassLogProb(lambda x: x.detach().flatten(1), 2)
    assert failed(reward) == {"differentiable"}
    prior = ig.priors.GaussianField(SHAPE)
    with pytest.raises(InputError, match="its gradient is None"):
        Problem(prior, reward=reward).gradient(images())


class SharedGram(Style):
    """Averages over the batch too, as a Gram matrix of a reshaped batch does."""

    def statistic(self, features: Tensor) -> Tensor:
        return super().statistic(features).mean(0, keepdim=True).expand(len(features), -1, -1)


class UnscaledGram(Style):
    def statistic(self, features: Tensor) -> Tensor:
        return features.flatten(2) @ features.flatten(2).mT / features.shape[1]


class Detour(torch.autograd.Function):
    """The identity with a gradient that is a tenth too small."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 0.9 * gradients[0]


def test_wrong_gradients_and_gram_matrices_are_found():
    layers, x, reference = Layers(), images(2), images(1, (3, 8, 9))[0]
    with pytest.raises(GradcheckError):
        test_gradients_are_central_differences(Style(Detour.apply, reference))
    assert failed(SharedGram(layers, reference)) == {"rows independent"}
    assert not torch.allclose(UnscaledGram(layers, reference)(x), Style(layers, reference)(x))


# ---- mistakes


IMAGE, LABELS = torch.rand(SHAPE), torch.zeros(SHAPE[1:], dtype=torch.int64)
FLAT = nn.Flatten()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassLogProb(FLAT, -1), "label is -1; expected class indices, 0 or more"),
        (lambda: ClassLogProb(FLAT, ()), r"label is \(\)"),
        (lambda: ClassLogProb(FLAT, 0.5), "label is 0.5; expected a class index"),
        (lambda: ClassLogProb(FLAT, torch.tensor([1, 2])), "One label per sample cannot be given"),
        (
            lambda: ClassLogProb(FLAT, 90)(images()),
            "label is 90; expected 0 to 89, the classifier",
        ),
        (lambda: ClassLogProb(FLAT, 1, temperature=0), "temperature is 0; expected a finite"),
        (lambda: ClassLogProb(FLAT, 1, marginal=-1), "marginal is -1; expected a finite"),
        (lambda: ClassLogProb(nn.Flatten, 1), "classifier is the class Flatten; pass an instance"),
        (
            lambda: ClassLogProb("resnet", 1),
            "classifier is 'resnet'; expected a callable of 1 argument",
        ),
        (lambda: ClassLogProb(FLAT, 1, transform=224), "transform is 224"),
        (
            lambda: ClassLogProb(lambda x: x, 1)(images()),
            r"shape \(3, 3, 6, 5\) for 3 images; expec",
        ),
        (lambda: ClassLogProb(lambda x: x.mean((1, 2, 3)), 1)(images()), r"shape \(3,\) for 3"),
        (lambda: ClassLogProb(lambda x: [x], 1)(images()), "returned a list; expected logits"),
        (
            lambda: ClassLogProb(lambda x: {"y": x}, 1)(images()),
            "returned a dict; expected logits",
        ),
        (lambda: ClassLogProb(lambda x: x[:, :1, 0, 0], 0)(images()), "a single class; expected"),
        (lambda: SegmentationAgreement(FLAT, LABELS[0]), r"labels have shape \(5,\)"),
        (lambda: SegmentationAgreement(FLAT, LABELS.float()), "labels are torch.float32"),
        (lambda: SegmentationAgreement(FLAT, LABELS, 0), "every pixel has the label 0"),
        (lambda: SegmentationAgreement(FLAT, LABELS - 1), "0 or more, or ignore_index=-1"),
        (
            lambda: SegmentationAgreement(nn.Identity(), LABELS + 3)(images()),
            "labels go up to 3; exp",
        ),
        (lambda: SegmentationAgreement(FLAT, LABELS)(images()), r"returned shape \(3, 90\)"),
        (
            lambda: ColourHistogram("a.png"),
            "reference is 'a.png'; expected its numbers: read the file first",
        ),
        (lambda: ColourHistogram(IMAGE[0, 0]), r"shape \(5,\); expected one image"),
        (
            lambda: ColourHistogram(IMAGE, bins=1),
            "bins is 1; expected a whole number of at least 2",
        ),
        (lambda: ColourHistogram(IMAGE, bandwidth=0), "bandwidth is 0"),
        (lambda: ColourHistogram(IMAGE)(images()[:, :1]), "images of 1 channels; expected 3"),
        (lambda: ColourHistogram(torch.full((3, 4), 0.5)), r"sum to \[2.0, 2.0, 2.0\]"),
        (lambda: ColourHistogram(torch.full((3, 4), 0.25), bins=5), r"expected \(C, 5\)"),
        (lambda: SoftPalette([(0, 0, 0)], temperature=0), "temperature is 0"),
        (lambda: SoftPalette([0.1]), r"colours is \[0.1\]; expected a tuple \(K, C\)"),
        (lambda: SoftPalette([(0, 0)])(images()), "images of 3 channels; expected 2"),
        (lambda: Style(nn.Identity(), IMAGE[None]), r"drop the batch axis with reference\[0\]"),
        (lambda: Style(nn.Identity(), (255 * IMAGE).byte()), r"reference.float\(\) / 255"),
        (lambda: Style(nn.Identity(), IMAGE / 0), "NaN or infinite"),
        (
            lambda: Style(nn.Identity(), "a.png"),
            "reference is 'a.png'; expected its numbers: read the file first",
        ),
        (lambda: Style(nn.Identity(), IMAGE)(images()[:, :1]), "images of 1 channels; expected 3"),
        (lambda: Style(FLAT, IMAGE), r"features \(1, 90\); expected positions"),
        (lambda: Style(lambda x: "features", IMAGE), "returned str; expected floating-point"),
        (lambda: Style(lambda x: [x, None], IMAGE), "returned NoneType; expected floating"),
        (lambda: Style(lambda x: [], IMAGE), "returned no features"),
        (lambda: Style(lambda x: x[0], IMAGE), r"features \(3, 6, 5\) for 1 images"),
        (lambda: Style(nn.Identity(), IMAGE, (1, 2)), "expected 1 finite numbers, one per layer"),
        (lambda: Perceptual(nn.Identity(), IMAGE, (math.nan,)), "each a finite number"),
        (lambda: Perceptual(nn.Identity(), IMAGE)(images(2, (3, 9, 9))), "of the images' size"),
        (lambda: TotalVariation()(images(2, (3, 1, 9))), "1 x 9 pixels; expected at least 2 x 2"),
        (lambda: TotalVariation()(images()[0]), r"batch of shape \(3, 6, 5\); expected images"),
        (lambda: Colourfulness(-1), "target is -1"),
        (lambda: Colourfulness()(images()[:, :1]), "images of 1 channels; expected 3"),
        (lambda: Preprocess((0, 0), (1,)), "one number per channel in each"),
        (lambda: Preprocess(std=(0,)), "each a finite number above 0"),
        (lambda: Preprocess(size=0), "size is 0; expected a whole number of at least 1"),
        (
            lambda: Preprocess.imagenet()(images()[:, :2]),
            r"expected images \(N, C, H, W\), C 3 or 1",
        ),
    ],
)
def test_mistakes_are_named(make: Callable[[], Any], message: str):
    with pytest.raises(InputError, match=message):
        make()


def test_a_wrong_shape_is_a_shape_error():
    with pytest.raises(ShapeError, match=r"reward|images"):
        Colourfulness()(images()[0])
