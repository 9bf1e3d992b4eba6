"""Rewards: files on disk, counted blobs, brute force and plain arithmetic as oracles; every planted fault is found."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import invguide as ig
from invguide.adapters.rewards import FunctionReward
from invguide.errors import InputError, RunError, ShapeError
from invguide.forward_operator import Operator
from invguide.problem.problem import Problem
from invguide.reward import Reward, Weighted, as_reward
from invguide.rewards import ConnectedComponents, FileSize, Palette
from invguide.verify.rewards import Checkerboard, Indicator, Staircase

SHAPE = (3, 8, 8)


def brightness(x: Tensor) -> Tensor:
    return x.mean((1, 2, 3))


def contrast(x: np.ndarray) -> np.ndarray:
    return np.std(np.sort(x, -1), axis=(1, 2, 3))


def images(count: int = 4) -> Tensor:
    return torch.rand(count, *SHAPE, dtype=torch.float64)


# ---- what as_reward finds out


def test_a_torch_function_is_differentiable():
    reward, x = as_reward(brightness), images().requires_grad_()
    assert torch.equal(reward(x), x.mean((1, 2, 3)))
    assert reward.differentiable
    (gradient,) = torch.autograd.grad(reward(x).sum(), x)
    assert torch.allclose(gradient, torch.full_like(x, 1 / x[0].numel()))
    assert not reward(x.detach()).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_numpy_function_is_a_black_box(dtype: torch.dtype):
    reward, x = as_reward(contrast), images().to(dtype)
    scores = reward(x)
    assert not reward.differentiable
    assert scores.dtype == dtype
    np.testing.assert_array_equal(scores.numpy(), np.std(np.sort(x.numpy(), -1), axis=(1, 2, 3)))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [row.mean().item() for row in x],
        lambda x: [row.detach().mean() for row in x],
        lambda x: x.mean((1, 2, 3)).detach(),
        lambda x: x.detach().numpy().mean((1, 2, 3)),
        lambda x: torch.from_numpy(x.numpy().mean((1, 2, 3))),  # refuses a tensor with gradients
    ],
    ids=["list", "list of tensors", "detached", "numpy inside", "numpy without detach"],
)
def test_a_function_of_tensors_without_gradient_is_a_black_box(function: Callable[..., Any]):
    reward, x = as_reward(function), images()
    torch.testing.assert_close(reward(x), x.mean((1, 2, 3)))
    assert not reward.differentiable


def test_the_first_call_costs_one_row_more():
    asked: list[int] = []

    def counted(x: Tensor) -> Tensor:
        asked.append(len(x))
        return brightness(x)

    reward = as_reward(counted)
    reward(images())
    reward(images())
    assert asked == [1, 4, 4]


def test_declared_differentiability_is_kept():
    assert as_reward(brightness, differentiable=False).differentiable is False
    reward, x = as_reward(brightness, differentiable=False), images().requires_grad_()
    assert not reward(x).requires_grad
    assert not reward.differentiable
    broken = as_reward(lambda x: brightness(x.detach()), differentiable=True)
    with pytest.raises(InputError, match="declared differentiable, but its gradient does not"):
        broken(x)


def test_gradients_are_not_lost_in_the_first_call():
    x = images().requires_grad_()
    (gradient,) = torch.autograd.grad(as_reward(brightness)(x).sum(), x)
    assert bool((gradient > 0).all())
    with torch.inference_mode():
        reward = as_reward(brightness)
        reward(images())
    assert reward.differentiable


def test_a_module_follows_x(device: torch.device):
    scorer = nn.Sequential(nn.Flatten(), nn.Linear(192, 1), nn.Flatten(0)).double()
    assert as_reward(scorer)(images().to(device)).device.type == device.type


def test_as_reward_returns_rewards_as_they_are():
    reward = FileSize()
    assert as_reward(reward) is reward
    assert ig.as_reward is as_reward
    assert ig.rewards.FileSize is FileSize
    with pytest.raises(InputError, match="differentiable=True, but FileSize"):
        as_reward(reward, differentiable=True)
    with pytest.raises(InputError, match=r"pass an instance, FileSize\("):
        as_reward(FileSize)
    with pytest.raises(InputError, match="the reward is a str"):
        as_reward("brightness")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda x: x.mean(), r"returned shape \(\) for 4 samples; expected \(4,\)"),
        (lambda x: x.mean((2, 3)), r"returned shape \(4, 3\)"),
        (lambda x: "good", "returned a str"),
        (lambda x: None, "returned a NoneType"),
        (lambda x: x.mean((1, 2, 3)) * 1j, "complex numbers"),
    ],
    ids=["scalar", "per channel", "text", "nothing", "complex"],
)
def test_wrong_outputs_are_named(value: Callable[..., Any], message: str):
    with pytest.raises(InputError, match=message):
        as_reward(value)(images())


# ---- operators


class Scorer(Operator):
    """Stands for any black box: one number per sample, NaN where it failed."""

    differentiable = False

    def __init__(self, broken: int | None = 1) -> None:
        super().__init__()
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        score = x.detach().mean((1, 2, 3))
        if self.broken is not None:
            score[self.broken] = math.nan
        x.zero_()
        return score


def test_an_operator_is_a_black_box_whose_nan_rows_stay():
    reward, x = as_reward(Scorer()), images()
    expected = x.mean((1, 2, 3))
    scores = reward(x)
    assert not reward.differentiable
    assert torch.isnan(scores).tolist() == [False, True, False, False]
    assert torch.equal(scores[2:], expected[2:])  # and x is as it was
    assert reward.changes_input(x)

    class Image(Scorer):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ShapeError, match="returned shape"):
        as_reward(Image())(x)


def test_a_program_that_scores_is_a_reward(tmp_path: Path):
    script = tmp_path / "brightest.py"
    script.write_text(
        "import json, sys\n"
        "(image,) = json.load(open(sys.argv[1]))\n"
        "if image[0][0] > 0.9: sys.exit('too bright')\n"
        "json.dump(max(map(max, image)), open(sys.argv[2], 'w'))\n"
    )
    command = ig.Command(f"'{sys.executable}' '{script}' {{input}} {{output}}", format="json")
    x = 0.5 * torch.rand(3, 1, 4, 5, dtype=torch.float64)
    x[1, 0, 0, 0] = 1
    scores = as_reward(ig.BlackBox(command))(x)
    expected = x.amax((1, 2, 3))
    expected[1] = math.nan
    torch.testing.assert_close(scores, expected, equal_nan=True)
    with pytest.raises(InputError, match=r"a Command too, can be given as BlackBox"):
        as_reward(command)(x)


# ---- weighted sums


def test_weighted_sums_are_linear_combinations():
    x = images().requires_grad_()
    a, b = as_reward(brightness), as_reward(lambda x: x.square().sum((1, 2, 3)))
    mean, square = x.mean((1, 2, 3)), x.square().sum((1, 2, 3))
    for reward, expected in [
        (0.5 * a + 2 * b, 0.5 * mean + 2 * square),
        (a - b, mean - square),
        (-a, -mean),
        (sum([a, b, a]), 2 * mean + square),
        (3 * (a + -0.5 * b) * 2, 6 * mean - 3 * square),
        (np.float64(2) * a, 2 * mean),
        (torch.tensor(2.0) * a, 2 * mean),
    ]:
        assert isinstance(reward, Weighted)
        torch.testing.assert_close(reward(x), expected)
        torch.testing.assert_close(
            torch.autograd.grad(reward(x).sum(), x)[0],
            torch.autograd.grad(expected.sum(), x, retain_graph=True)[0],
        )


def test_a_sum_is_differentiable_if_all_parts_are():
    smooth, sharp = as_reward(brightness, differentiable=True), FileSize()
    assert (smooth + 2 * smooth).differentiable
    assert not (smooth + 0.1 * sharp).differentiable
    unknown = smooth + as_reward(contrast)
    unknown(images())
    assert not unknown.differentiable


def test_sums_are_readable_values():
    reward = 0.5 * FileSize("png") - 2 * ConnectedComponents(target=3) + as_reward(brightness)
    assert repr(reward) == (
        "0.5 * FileSize(format='png', quality=None, target=None)"
        " - 2 * ConnectedComponents(target=3, threshold=0.5, connectivity=1) + as_reward(brightness)"
    )
    assert 2 * FileSize() == 2 * FileSize()
    assert 2 * FileSize() != 3 * FileSize()


def test_what_cannot_be_added_is_refused():
    with pytest.raises(InputError, match=r"wrap a function as as_reward\(function\)"):
        operator.add(FileSize(), brightness)
    with pytest.raises(InputError, match="leave constants out"):
        operator.add(FileSize(), 1)
    with pytest.raises(InputError, match=r"FileSize.*the weight is nan; expected a finite number"):
        operator.mul(math.nan, FileSize())
    with pytest.raises(TypeError):
        operator.mul(FileSize(), FileSize())


def test_nan_of_one_part_is_nan_of_the_sum():
    def partly(x: Tensor) -> Tensor:
        score = brightness(x)
        score[1] = math.nan
        return score

    scores = (as_reward(brightness) + 0.1 * as_reward(partly, False))(images())
    assert torch.isnan(scores).tolist() == [False, True, False, False]


# ---- failures


def picky(x: np.ndarray) -> np.ndarray:
    if (x[:, 0, 0, 0] > 0.9).any():
        raise ValueError("a corner is too bright")
    return np.sort(x, -1).mean((1, 2, 3))


@pytest.mark.parametrize("bad_row", [0, 2])
def test_rows_that_raise_are_nan_and_counted(bad_row: int):
    x = 0.5 * images()
    x[bad_row, 0, 0, 0] = 1
    reward = as_reward(picky)
    assert isinstance(reward, FunctionReward)
    scores = reward(x)
    expected = x.mean((1, 2, 3))
    expected[bad_row] = math.nan
    torch.testing.assert_close(scores, expected, equal_nan=True)
    assert not torch.isnan(reward(0.5 * images())).any()
    reward(x)
    assert (reward.failures.count, reward.failures.batches) == (2, 2)
    assert reward.failures.first == "ValueError: a corner is too bright"


def test_a_black_box_that_always_raises_is_an_error():
    x = images()
    x[:, 0, 0, 0] = 1
    with pytest.raises(InputError, match=r"as_reward\(picky\) takes neither .* too bright"):
        as_reward(picky)(x)
    reward = as_reward(picky)
    reward(0.5 * images())
    with pytest.raises(RunError, match="raised for every one of 4 samples: ValueError: a corner"):
        reward(x)


def test_a_function_of_one_row_at_a_time_works():
    def single(x: Tensor) -> Tensor:
        return x.reshape(SHAPE).mean().reshape(1)

    reward, x = as_reward(single, differentiable=False), images()
    torch.testing.assert_close(reward(x), x.mean((1, 2, 3)))
    assert isinstance(reward, FunctionReward)
    assert (reward.failures.count, reward.failures.batches) == (0, 1)


def test_the_exception_of_a_differentiable_reward_passes():
    def touchy(x: Tensor) -> Tensor:
        if bool((x > 2).any()):
            raise ZeroDivisionError("no luck")
        return brightness(x)

    reward, x = as_reward(touchy), images()
    reward(x)
    with pytest.raises(ZeroDivisionError, match="no luck") as caught:
        reward(x + 2)
    notes = getattr(caught.value, "__notes__", ["differentiable=False"])  # Python 3.10 has none
    assert "differentiable=False" in notes[0]


# ---- changes in place


def test_black_boxes_cannot_change_x():
    def crush(x: np.ndarray) -> np.ndarray:
        x[:] = np.round(x)
        return x.mean((1, 2, 3))

    def crush_tensor(x: Tensor) -> Tensor:
        return x.detach().round_().mean((1, 2, 3))

    for reward in (as_reward(crush), as_reward(crush_tensor)):
        x = images()
        before = x.clone()
        torch.testing.assert_close(reward(x), x.round().mean((1, 2, 3)))
        assert torch.equal(x, before)


@pytest.mark.parametrize("leaf", [True, False])
def test_a_change_in_place_is_an_error_where_gradients_are_taken(leaf: bool):
    reward, x = (
        as_reward(lambda x: x.square().sum((1, 2, 3)) + x.mul_(2).mean((1, 2, 3))),
        images(),
    )
    before = x.clone()
    reward(x)  # harmless without gradients
    assert reward.differentiable
    x.requires_grad_()
    given = x if leaf else 1 * x
    with pytest.raises(InputError, match="changes its input in place"):
        reward(given)
    assert torch.equal(given, before)


# ---- check


class Mutating(Reward):
    def __call__(self, x: Tensor) -> Tensor:
        return brightness(x.detach().mul_(0.5)) + 0 * brightness(x)


class Column(Reward):
    def __call__(self, x: Tensor) -> Tensor:
        return brightness(x)[:, None]


def noisy(x: Tensor) -> Tensor:
    return brightness(x) + 1e-3 * torch.randn(len(x)).to(x)


def coupled(x: Tensor) -> Tensor:
    return brightness(x / x.amax())


def centred(x: np.ndarray) -> np.ndarray:
    return contrast(x) - contrast(x).mean()


def failed(reward: Reward, x: Tensor | None = None) -> set[str]:
    certificate = reward.check(None if x is not None else SHAPE, x, quiet=True)
    rows = {row.name for row in certificate.rows if row.verdict == "FAILS"}
    assert certificate.ok == (not rows)
    return rows


@pytest.mark.parametrize(
    "reward",
    [
        as_reward(brightness),
        as_reward(lambda x: -(x - 0.3).abs().sum((1, 2, 3))),
        as_reward(contrast),
        as_reward(nn.Sequential(nn.Flatten(), nn.Linear(192, 1), nn.Flatten(0))),  # float32 only
        FileSize(),
        ConnectedComponents(),
        Palette([(0, 0, 0), (1, 0, 0)]),
        0.5 * as_reward(brightness) - FileSize("png"),
        as_reward(brightness, differentiable=False),
    ],
    ids=repr,
)
def test_good_rewards_pass_their_check(reward: Reward):
    assert failed(reward) == set()


@pytest.mark.parametrize(
    ("reward", "row"),
    [
        (as_reward(coupled), "rows independent"),
        (as_reward(centred), "rows independent"),
        (as_reward(noisy), "deterministic"),
        (as_reward(lambda x: x.mul_(2).mean((1, 2, 3))), "input unchanged"),
        (as_reward(lambda x: np.copyto(x, 0) or x.mean((1, 2, 3))), "input unchanged"),
        (as_reward(brightness) + as_reward(lambda x: x.neg_().mean((1, 2, 3))), "input unchanged"),
        (as_reward(Scorer(None)), "input unchanged"),
        (Mutating(), "input unchanged"),
        (as_reward(lambda x: (x - 0.5).log().mean((1, 2, 3))), "finite"),
        (as_reward(lambda x: brightness(x.detach()), differentiable=True), "differentiable"),
        (as_reward(lambda x: brightness(x.round()), differentiable=True), "differentiable"),
        (as_reward(lambda x: (x - x.detach()).sqrt().sum((1, 2, 3))), "differentiable"),
        (as_reward(lambda x: x.mean()), "runs"),
        (Column(), "runs"),
        (as_reward(lambda x: 1 / 0), "runs"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_planted_faults_are_found(reward: Reward, row: str):
    assert row in failed(reward)


def test_a_wrong_gradient_is_noted():
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return 0.5 * grads[0]

    right = as_reward(brightness).check(SHAPE, quiet=True)["differentiable"]
    wrong = as_reward(lambda x: brightness(Halved.apply(x))).check(SHAPE, quiet=True)
    assert right.verdict == "ok"
    assert wrong["differentiable"].verdict == "note"
    assert "5.0e-01" in wrong["differentiable"].value


def test_samples_that_a_black_box_leaves_out_are_a_note(capsys: pytest.CaptureFixture[str]):
    x = 0.5 * images()
    x[1, 0, 0, 0] = 1
    certificate = as_reward(picky).check(x=x)
    assert certificate.ok
    assert certificate["finite"].value == "1 of 4 samples are NaN or infinite"
    assert "first ValueError: a corner is too bright" in certificate["failures"].value
    assert capsys.readouterr().out == f"{certificate}\n"
    assert str(certificate).startswith("as_reward(picky): fit for use")
    assert (
        as_reward(lambda x: np.zeros(len(x))).check(SHAPE, quiet=True)["values"].verdict == "note"
    )
    with pytest.raises(InputError, match="check needs either shape"):
        FileSize().check()


# ---- data units


def test_rewards_see_data_units():
    prior = ig.priors.GaussianField((1, 4, 4))
    prior.scale, prior.shift = 0.5, 0.25
    seen: list[Tensor] = []

    def recorded(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return brightness(x)

    x0 = torch.randn(2, 1, 4, 4)
    log_prob, _, gradient = Problem(prior, reward=as_reward(recorded, True)).gradient(x0)
    torch.testing.assert_close(seen[0], 0.5 * x0 + 0.25)
    torch.testing.assert_close(log_prob, (0.5 * x0 + 0.25).mean((1, 2, 3)))
    torch.testing.assert_close(gradient, torch.full_like(x0, 0.5 / 16))


# ---- the rewards that ship


def photographs(channels: int) -> np.ndarray:
    """Three pictures of 8 bits that take different room: flat, smooth and noise."""
    rng = np.random.default_rng(0)
    ramp = np.broadcast_to(np.linspace(0, 255, 40), (channels, 32, 40))
    stack = [np.full_like(ramp, 90), ramp, rng.uniform(0, 255, ramp.shape)]
    return np.stack(stack).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("format", "quality"), [("jpeg", None), ("jpeg", 30), ("png", None)])
def test_file_size_is_what_lies_on_disk(
    tmp_path: Path, channels: int, format: str, quality: int | None
):
    pictures, sizes = photographs(channels), []
    for i, picture in enumerate(pictures):
        path = tmp_path / f"{i}.{format}"
        shown = Image.fromarray(picture[0] if channels == 1 else np.moveaxis(picture, 0, -1))
        shown.save(path, **({} if quality is None else {"quality": quality}))
        sizes.append(path.stat().st_size / 1000)
    x = torch.from_numpy(pictures).double() / 255
    np.testing.assert_allclose(FileSize(format, quality)(x).numpy(), -np.array(sizes))
    np.testing.assert_allclose(
        FileSize(format, quality, target=1.2)(x).numpy(), -abs(np.array(sizes) - 1.2)
    )
    assert sizes[0] < sizes[1] < sizes[2]


def test_file_size_of_other_channels_adds_up():
    x = torch.from_numpy(photographs(4)) / 255
    parts = torch.stack([FileSize("png")(x[:, i : i + 1]) for i in range(4)])
    torch.testing.assert_close(FileSize("png")(x), parts.sum(0))
    torch.testing.assert_close(FileSize()(2 * x - 0.5), FileSize()((2 * x - 0.5).clamp(0, 1)))


def blobs(count: int) -> Tensor:
    x = torch.zeros(24, 24)
    for i in range(count):
        row, column = 6 * (i // 4), 6 * (i % 4)
        x[row : row + 3, column : column + 4] = 0.9
    return x


@pytest.mark.parametrize("channels", [1, 3])
def test_connected_components_are_counted(channels: int):
    counts = [0, 1, 5, 16]
    x = torch.stack([blobs(n).expand(channels, 24, 24) for n in counts])
    assert ConnectedComponents()(x).tolist() == [0, -1, -5, -16]
    assert ConnectedComponents(target=4)(x).tolist() == [-4, -3, -1, -12]
    assert ConnectedComponents(threshold=0.95)(x).tolist() == [0, 0, 0, 0]


def test_corners_connect_on_demand():
    x = torch.eye(6)[None, None]
    assert ConnectedComponents()(x).tolist() == [-6]
    assert ConnectedComponents(connectivity=2)(x).tolist() == [-1]
    assert ConnectedComponents()(torch.tensor([[[1.0, 0, 1, 1, 0, 1]]])).tolist() == [-3]
    with pytest.raises(ShapeError, match="expected a channel axis and at least 3 more"):
        ConnectedComponents(connectivity=3)(x)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("k", [1, 3])
def test_palette_is_the_brute_force_nearest_colour(channels: int, k: int):
    colours, x = torch.rand(7, channels).double(), torch.rand(3, channels, 6, 5).double()
    distances = (x[:, None] - colours[None, :, :, None, None]).norm(dim=2)  # (3, 7, 6, 5)
    expected = -distances.sort(1).values[:, :k].mean((1, 2, 3))
    torch.testing.assert_close(Palette(colours, k)(x), expected)
    assert Palette(colours) == Palette(colours.tolist())


@pytest.mark.parametrize(
    "reward", [FileSize(), ConnectedComponents(), Palette([(0,)])], ids=lambda r: type(r).__name__
)
def test_shipped_rewards_keep_the_contract(reward: Reward, device: torch.device):
    x = torch.rand(3, 1, 9, 7, device=device)
    x[1, 0, 2, 3] = math.nan
    scores = reward(x.requires_grad_())
    assert torch.isnan(scores).tolist() == [False, True, False]
    assert (scores.dtype, scores.device, scores.requires_grad) == (x.dtype, x.device, False)
    assert reward.check((1, 9, 7), quiet=True).ok
    with pytest.raises(ShapeError, match=rf"{type(reward).__name__}.* was given samples of shape"):
        reward(torch.rand(3, 7)[:, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FileSize("jpg"), "format is 'jpg'; did you mean 'jpeg'"),
        (lambda: FileSize("png", quality=9), "a png file has none"),
        (
            lambda: FileSize(quality=0),
            "quality is 0; expected a whole number from 1 to 100",
        ),
        (lambda: FileSize(target=0), "target is 0"),
        (lambda: ConnectedComponents(target=-1), "target is -1"),
        (lambda: ConnectedComponents(connectivity=0), "connectivity is 0"),
        (lambda: Palette([0.1, 0.2]), r"colours is \[0.1, 0.2\]; expected a tuple \(K, C\)"),
        (lambda: Palette([]), r"colours is \[\]; expected a tuple \(K, C\)"),
        (lambda: Palette(["red"]), r"colours is \[.red.\]; expected a tuple \(K, C\)"),
        (lambda: Palette([(0, 0, 0)], k=2), "k is 2; expected 1 to 1"),
        (lambda: Palette([(0, 0, 0)])(torch.rand(1, 1, 4, 4)), "1 channels and the colours 3"),
        (lambda: Indicator(width=0), "width is 0"),
        (lambda: Staircase(height=math.inf), "height is inf"),
        (lambda: Staircase()(torch.rand(4, 3)), r"expected points of the plane \(N, 2\)"),
    ],
)
def test_settings_that_cannot_be_are_named(make: Callable[[], Any], message: str):
    with pytest.raises(InputError, match=message):
        make()


# ---- rewards on the plane


def test_rewards_on_the_plane():
    x = 4 * torch.randn(200, 2, dtype=torch.float64)
    points = x.tolist()
    assert Staircase(2, 0.5)(x).tolist() == [2 * math.floor(a / 0.5) for a, _ in points]
    assert Indicator(3, 2.5)(x).tolist() == [3 * (math.hypot(a, b) <= 2.5) for a, b in points]
    assert Checkerboard(2, 1.5)(x).tolist() == [
        2 * ((math.floor(a / 1.5) + math.floor(b / 1.5)) % 2 == 0) for a, b in points
    ]
    for kind in (Staircase, Indicator, Checkerboard):
        assert not kind().differentiable
        assert kind().check(x=x, quiet=True).ok
        assert repr(kind()) == f"{kind.__name__}(height=1.0, width=1.0)"
