"""The guided-diffusion network: outputs of the original code, attention by hand, files that tell enough or do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from invguide.errors import CheckpointError, InputError
from invguide.priors.checkpoints import adm as adm_checkpoints
from invguide.priors.checkpoints.adm import PRESETS, Preset, infer_architecture
from invguide.priors.checkpoints.loading import load
from invguide.priors.networks.adm import ADM, Architecture, Attention, sinusoids

TINY = Architecture(
    image_channels=3,
    output_channels=6,
    model_channels=32,
    channels=(32, 64),
    attention=(False, True),
    num_res_blocks=1,
)
CASES: dict[str, tuple[Architecture, dict[str, Any]]] = {
    "legacy": (TINY, {"num_head_channels": 16, "qkv_order": "legacy"}),
    "new": (replace(TINY, num_classes=5), {"num_head_channels": 32, "qkv_order": "new"}),
    "heads": (
        replace(TINY, num_classes=5, channels=(32, 64, 96), attention=(False, True, True)),
        {"num_heads": 4, "qkv_order": "legacy"},
    ),
    "plain": (
        replace(
            TINY,
            output_channels=3,
            channels=(64, 32),
            num_res_blocks=2,
            scale_shift_norm=False,
            resblock_updown=False,
        ),
        {"num_heads": 2, "qkv_order": "new"},
    ),
    "half": (
        replace(TINY, model_channels=64, channels=(32, 64, 64), attention=(False, False, True)),
        {"num_head_channels": 32, "qkv_order": "legacy"},
    ),
}
# Mean, standard deviation and six elements of the output of OpenAI's own UNetModel (guided-diffusion, commit
# 22e0df8, float32) with the same weights and inputs, which `known` makes anywhere.
RECORDED = {
    "legacy": "0.0904765 0.5473976 -0.0266913 -0.1629193 0.0601087 0.0016624 -0.0378324 0.1683515",
    "new": "0.0103401 0.5136434 0.3112506 -0.1633321 0.4348515 0.2206949 0.2816374 -0.282795",
    "heads": "0.023431 0.5539783 -0.3631085 0.3121829 0.1375282 0.3706339 0.0183695 0.2391549",
    "plain": "-0.0262026 0.6303969 0.0531171 0.0044544 0.6854173 0.1779206 -0.0652989 0.8435332",
    "half": "-0.0124237 0.5810851 0.0488127 -0.032458 -0.5494683 -0.215236 0.4152574 -0.3024573",
}


pytestmark = pytest.mark.usefixtures("unchecked")


def known(seed: int, count: int) -> Tensor:
    """Numbers in [-1, 1) that do not depend on versions: raw output of a generator that never changes."""
    raw = np.random.PCG64(seed).random_raw(count) >> np.uint64(11)
    return torch.from_numpy(raw * 2.0**-53 * 2 - 1)


def filled(net: nn.Module) -> Any:
    state = {}
    for k, (name, p) in enumerate(sorted(net.state_dict().items())):
        v = known(k, p.numel()).reshape(p.shape)
        v = v * math.sqrt(3 / p[0].numel()) if p.ndim > 1 else 0.1 * v
        state[name] = (1 + v if name.endswith("weight") and p.ndim == 1 else v).float()
    net.load_state_dict(state)
    return net.eval()


def inputs(architecture: Architecture) -> tuple[Tensor, ...]:
    x = known(1000, 2 * 3 * 16 * 8).reshape(2, 3, 16, 8).float()
    time = torch.tensor([0.0, 617.25])
    return (x, time, torch.tensor([4, 0])) if architecture.num_classes else (x, time)


def recorded_error(name: str, **changed: Any) -> float:
    architecture, attention = CASES[name]
    net = filled(ADM(architecture, **(attention | changed)))
    with torch.no_grad():
        output = net(*inputs(architecture)).double().flatten()
    found = torch.stack([output.mean(), output.std(), *output[:: len(output) // 6][:6]])
    expected = torch.tensor([float(v) for v in RECORDED[name].split()], dtype=torch.float64)
    return float((found - expected).abs().max())


# float32: some 30 layers of products of order one, and the record is rounded to 1e-7.
@pytest.mark.parametrize("name", CASES)
def test_original_outputs(name: str):
    assert recorded_error(name) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_the_wrong_order_or_number_of_heads_loads_and_is_noticed(name: str):
    order = CASES[name][1]["qkv_order"]
    assert recorded_error(name, qkv_order={"new": "legacy", "legacy": "new"}[order]) > 1e-2
    assert recorded_error(name, num_heads=8, num_head_channels=None) > 1e-2


@pytest.mark.parametrize("order", ["legacy", "new"])
def test_attention_by_hand(order: Any):
    """Pixel by pixel and head by head, with the rows of the projection picked by their definition."""
    layer = filled(Attention(32, 4, order)).double()
    x = torch.randn(1, 32, 2, 3, dtype=torch.float64)
    group = x.reshape(32, 6)  # 32 groups: each channel is normalised by itself
    normal = (group - group.mean(1, keepdim=True)) / (
        group.var(1, keepdim=True, correction=0) + 1e-5
    ).sqrt()
    normal = normal * layer.norm.weight[:, None] + layer.norm.bias[:, None]
    rows = layer.qkv.weight[:, :, 0] @ normal + layer.qkv.bias[:, None]
    mixed = torch.zeros(32, 6, dtype=torch.float64)
    for head in range(4):
        for c in range(8):
            where = [
                head * 24 + part * 8 + c if order == "legacy" else part * 32 + head * 8 + c
                for part in range(3)
            ]
            if c == 0:
                starts = where
        q, k, v = (rows[s : s + 8] for s in starts)
        for pixel in range(6):
            weight = (q[:, pixel] @ k / math.sqrt(8)).softmax(0)
            mixed[head * 8 : head * 8 + 8, pixel] = v @ weight
    expected = x + (layer.proj_out.weight[:, :, 0] @ mixed + layer.proj_out.bias[:, None]).reshape(
        x.shape
    )
    torch.testing.assert_close(layer(x), expected)


def test_sinusoids_by_hand():
    time, width = 37.5, 10
    expected = [math.cos(time * 10000 ** (-k / 5)) for k in range(5)]
    expected += [math.sin(time * 10000 ** (-k / 5)) for k in range(5)]
    found = sinusoids(torch.tensor([time]), width)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)  # float32 phases up to 40


# ---- files


def save(path: Path, name: str) -> ADM:
    architecture, attention = CASES[name]
    net = filled(ADM(architecture, **attention))
    torch.save(net.state_dict(), path)
    return net


@pytest.mark.parametrize("name", CASES)
def test_architecture_is_inferred(name: str):
    architecture, attention = CASES[name]
    assert infer_architecture(ADM(architecture, **attention).state_dict(), "a.pt") == architecture


# Parameters as published by Dhariwal and Nichol 2021; FFHQ from the 357 MB of its file, four bytes each.
PAPER_MILLIONS = {
    "ffhq-256": 94,
    "imagenet-256": 553,
    "imagenet-64-cond": 296,
    "imagenet-128-cond": 422,
    "imagenet-256-cond": 554,
    "imagenet-512-cond": 559,
}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_presets_can_be_built_and_recognised(preset: Preset):
    with torch.device("meta"):
        net = ADM(
            preset.architecture,
            num_heads=preset.num_heads,
            num_head_channels=preset.num_head_channels,
            qkv_order=preset.qkv_order,
        )
    weights = net.state_dict()
    assert infer_architecture(weights, "a.pt") == preset.architecture
    millions = round(sum(w.numel() for w in weights.values()) / 1e6)
    assert millions == PAPER_MILLIONS[preset.name]


def ddpm_denoised(net: ADM, x: Tensor, k: int, label: Tensor | None) -> tuple[Tensor, float]:
    """E[x0 | x_t] at step k of the linear schedule, equation 15 of DDPM, for x = x_t / sqrt(abar)."""
    bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[k]
    x_t = math.sqrt(bar) * x
    with torch.no_grad():
        eps = net(x_t, torch.full((len(x),), float(k)), label)[:, :3]
    return (x_t - math.sqrt(1 - bar) * eps) / math.sqrt(bar), math.sqrt((1 - bar) / bar)


@pytest.mark.parametrize("name", ["legacy", "new"])
def test_round_trip_through_a_file(tmp_path: Path, name: str):
    net = save(tmp_path / "mine.pt", name)
    prior = load(tmp_path / "mine.pt", **CASES[name][1])
    assert prior.shape == (3, None, None)
    x, _, *label = inputs(CASES[name][0])
    condition = {"label": label[0]} if label else {}
    for k in (0, 50, 300, 700, 999):
        expected, sigma = ddpm_denoised(net, x, k, label[0] if label else None)
        found = prior.denoise(x, sigma, **condition)
        # float32, and D is x minus sigma times the output, of order one.
        assert float((found - expected).abs().max()) < 1e-5 * max(1, sigma)
    if label:
        with pytest.raises(InputError, match="conditional on one of 5 classes"):
            prior.denoise(x, 1.0)
        with pytest.raises(InputError, match=r"from 0 to 4, one per sample; got \[5, 0\]"):
            prior.denoise(x, 1.0, label=torch.tensor([5, 0]))


def test_gradients_reach_x_though_weights_are_frozen(tmp_path: Path):
    save(tmp_path / "mine.pt", "legacy")
    prior = load(tmp_path / "mine.pt", num_head_channels=16, qkv_order="legacy")
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(prior.denoise(x, 0.5)[0].sum(), x)
    assert gradient[0].abs().max() > 0
    assert gradient[1].abs().max() == 0
    odd = prior.denoise(torch.randn(1, 3, 9, 13), 0.5)  # reflected to a multiple of 2
    assert odd.shape == (1, 3, 9, 13)


def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = Preset("tiny", "", ("tiny_published",), 16, TINY, num_head_channels=16)
    monkeypatch.setitem(adm_checkpoints.PRESETS, "tiny", preset)


def test_a_preset_or_a_published_name_tells_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tiny_preset(monkeypatch)
    for name, options in (("mine", {"preset": "tiny"}), ("tiny_published", {})):
        net = save(tmp_path / f"{name}.pt", "legacy")
        prior = load(tmp_path / f"{name}.pt", **options)
        assert prior.shape == (3, 16, 16)
        x = torch.randn(1, 3, 16, 16)
        expected, sigma = ddpm_denoised(net, x, 300, None)
        assert float((prior.denoise(x, sigma) - expected).abs().max()) < 1e-5


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("legacy", {}, r"of the size of preset 'tiny', .* pass preset='tiny'.*qkv_order='legacy'"),
    ("heads", {}, "network, and the file does not tell .* pass num_head_channels="),
    ("legacy", {"qkv_order": "legacy"}, "does not tell"),
    ("legacy", {"num_heads": 4}, "does not tell"),
    ("legacy", {"num_heads": 4, "num_head_channels": 16, "qkv_order": "new"}, "does not tell"),
    ("legacy", {"preset": "tiny", "qkv_order": "new"}, "give one or the other"),
    ("legacy", {"preset": "ffhq"}, "did you mean 'ffhq-256'"),
    ("legacy", {"preset": "ffhq-256"}, r"model_channels 32, not 128; channels \(32, 64\), not"),
    ("legacy", {"num_heads": 3, "qkv_order": "new"}, "64 channels cannot be divided into 3 heads"),
    ("legacy", {"num_heads": 4, "qkv_order": "old"}, "expected 'legacy' or 'new'"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSALS)
def test_refusals(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: dict[str, Any],
    message: str,
):
    tiny_preset(monkeypatch)
    save(tmp_path / "mine.pt", name)
    with pytest.raises(InputError, match=message):
        load(tmp_path / "mine.pt", **options)


def drop(weights: dict[str, Tensor]) -> None:
    del weights["middle_block.1.norm.bias"]


def reshape(weights: dict[str, Tensor]) -> None:
    weights["middle_block.1.norm.bias"] = torch.zeros(63)


def poison(weights: dict[str, Tensor]) -> None:
    weights["middle_block.1.norm.bias"][5] = math.nan


def integers(weights: dict[str, Tensor]) -> None:
    weights["middle_block.1.norm.bias"] = torch.zeros(64, dtype=torch.int64)


def gap(weights: dict[str, Tensor]) -> None:
    weights["input_blocks.1000000000.0.weight"] = torch.zeros(1)


def add(weights: dict[str, Tensor]) -> None:
    weights["extra"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            drop,
            r"1 missing, such as middle_block\.1\.norm\.bias.*no weight is ever left at random",
        ),
        (add, "1 not of this network, such as extra"),
        (reshape, r"norm\.bias: \(63,\) in the file, \(64,\) in the network"),
        (integers, r"torch\.int64 in the file"),
        (poison, r"NaN or infinity in middle_block\.1\.norm\.bias"),
        (gap, "are not numbered from 0 to 4"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, damage: Callable[..., None], message: str):
    weights = save(tmp_path / "mine.pt", "legacy").state_dict()
    damage(weights)
    torch.save(weights, tmp_path / "mine.pt")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "mine.pt", num_head_channels=16, qkv_order="legacy")
