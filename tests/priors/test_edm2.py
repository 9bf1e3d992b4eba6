"""The EDM2 network: outputs of the original code, the paper's equations by hand, weights files, latents."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tiny
from invguide.errors import CheckpointError, InputError
from invguide.priors import LatentPrior
from invguide.priors.checkpoints.edm2 import infer_architecture
from invguide.priors.checkpoints.loading import load
from invguide.priors.networks.edm2 import EDM2, Architecture, Balance

SIGMAS = (0.02, 0.2, 1.0, 5.0, 50.0)
HEADS = {"channels_per_head": 16}  # these networks are narrower than one head of the released ones
SMALL = Architecture(8, 3, (16, 32), (False, True), 1, noise_channels=16, embedding_channels=32)
CASES = {
    "any": SMALL,
    "class": Architecture(16, 4, (32, 16, 48), (True, False, True), 2, 24, 40, num_classes=5),
}
# Mean, standard deviation and six elements of the output of NVIDIA's own UNet (edm2, commit 4bf8162, float32) with
# the same weights and inputs, which `known` makes anywhere.
RECORDED = {
    "any": "-0.1112023 0.7645099 0.3480923 0.07343291 -0.8624981 0.6123156 0.104624 -0.6187747",
    "class": "0.589356 0.8621013 0.008536488 -0.5453227 0.6981416 0.4042577 0.3437907 0.5072754",
}


def known(seed: int, count: int) -> Tensor:
    """Numbers in [-1, 1) that do not depend on versions: raw output of a generator that never changes."""
    raw = np.random.PCG64(seed).random_raw(count) >> np.uint64(11)
    return torch.from_numpy(raw * 2.0**-53 * 2 - 1)


def filled(net: Any) -> Any:
    """Gains of about one, frequencies up to three, and weights whose scale the network takes out."""
    state = {}
    for k, (name, p) in enumerate(sorted(net.state_dict().items())):
        v = known(k, p.numel()).reshape(p.shape)
        state[name] = (v if p.ndim > 1 else 3 * v if p.ndim else 0.8 + 0.2 * v).float()
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)


def network(name: str, **balance: Any) -> EDM2:
    return filled(EDM2(CASES[name], Balance(**(HEADS | balance))))


def inputs(architecture: Architecture) -> tuple[Any, ...]:
    shape = (2, architecture.image_channels, architecture.size, architecture.size)
    x = known(1000, math.prod(shape)).reshape(shape).float()
    classes = architecture.num_classes
    labels = torch.eye(classes)[[3, 0]] if classes else None
    return x, torch.tensor([-0.9, 0.7]), labels


def recorded_error(name: str, **balance: Any) -> float:
    output = network(name, **balance)(*inputs(CASES[name])).double().flatten()
    found = torch.stack([output.mean(), output.std(), *output[:: len(output) // 6][:6]])
    expected = torch.tensor([float(v) for v in RECORDED[name].split()], dtype=torch.float64)
    return float((found - expected).abs().max())


# float32: some 20 layers of features of order one, and the record is rounded to 1e-7.
@pytest.mark.parametrize("name", CASES)
def test_original_outputs(name: str):
    assert recorded_error(name) < 1e-5


@pytest.mark.parametrize(
    "wrong",
    [
        {"channels_per_head": 8},
        {"residual": 0.5},
        {"attention": 0.5},
        {"label": 0.3},
        {"concatenation": 0.3},
        {"limit": 1.0},
    ],
    ids=str,
)
def test_a_wrong_balance_loads_and_is_noticed(wrong: dict[str, Any]):
    assert recorded_error("class", **wrong) > 1e-3


# ---- the equations of the paper, in double precision and one at a time


class ByHand:
    """Reads a state dict; `balance` as in the paper: 0.3 of residual branches, 0.5 of labels and of what is skipped."""

    def __init__(self, weights: dict[str, Tensor], heads: int = 16, limit: float = 256.0) -> None:
        self.weights = {k: v.double() for k, v in weights.items()}
        self.heads, self.limit = heads, limit

    def layer(self, name: str, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """Equations 47 and 66: every row of weights has length one."""
        w = self.weights[f"{name}.weight"]
        rows = w.flatten(1)
        rows = rows / (rows.norm(dim=1, keepdim=True) + 1e-4 * rows.shape[1] ** 0.5) * gain
        if x.ndim == 2:
            return torch.einsum("oi,bi->bo", rows, x)
        size = w.shape[-1]
        patches = nn.functional.unfold(x, size, padding=size // 2)
        return torch.einsum("oi,bip->bop", rows, patches).reshape(len(x), -1, *x.shape[2:])

    def activation(self, x: Tensor) -> Tensor:  # equation 81
        return x * torch.sigmoid(x) / 0.596

    def sum(self, a: Tensor, b: Tensor, t: float) -> Tensor:  # equation 88
        return ((1 - t) * a + t * b) / ((1 - t) ** 2 + t**2) ** 0.5

    def unit(self, x: Tensor, dim: int) -> Tensor:  # of pixels, and of queries, keys and values
        return x / (x.square().mean(dim, keepdim=True).sqrt() + 1e-4)

    def block(self, name: str, x: Tensor, embedding: Tensor) -> Tensor:
        def skip(x: Tensor) -> Tensor:
            there = f"{name}.conv_skip.weight" in self.weights
            return self.layer(f"{name}.conv_skip", x) if there else x

        if name.endswith("_down"):
            x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        if name.endswith("_up"):
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if name.startswith("enc"):
            x = self.unit(skip(x), 1)
        y = self.layer(f"{name}.conv_res0", self.activation(x))
        scale = 1 + self.layer(f"{name}.emb_linear", embedding, self.weights[f"{name}.emb_gain"])
        y = self.layer(f"{name}.conv_res1", self.activation(y * scale[:, :, None, None]))
        x = self.sum(skip(x) if name.startswith("dec") else x, y, 0.3)
        if f"{name}.attn_qkv.weight" in self.weights:
            rows = self.layer(f"{name}.attn_qkv", x).flatten(2)
            rows = rows.reshape(len(x), -1, self.heads, 3, rows.shape[2])
            q, k, v = (self.unit(rows[:, :, :, part], 2) for part in range(3))
            score = torch.einsum("bhcp,bhcq->bhpq", q, k) / self.heads**0.5
            mixed = torch.einsum("bhpq,bhcq->bhcp", score.softmax(-1), v).reshape(x.shape)
            x = self.sum(x, self.layer(f"{name}.attn_proj", mixed), 0.3)
        return x.clamp(-self.limit, self.limit)

    def raw(self, x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        w = self.weights
        waves = 2**0.5 * (time[:, None] * w["emb_fourier.freqs"] + w["emb_fourier.phases"]).cos()
        embedding = self.layer("emb_noise", waves)  # equation 75
        if labels is not None:
            label = self.layer("emb_label", labels.double() * labels.shape[1] ** 0.5)
            embedding = self.sum(embedding, label, 0.5)
        embedding = self.activation(embedding)
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        parts = list(dict.fromkeys(".".join(k.split(".")[:2]) for k in w))
        skipped = []
        for name in [p for p in parts if p.startswith("enc")]:
            x = self.layer(name, x) if "conv" in name else self.block(name, x, embedding)
            skipped.append(x)
        for name in [p for p in parts if p.startswith("dec")]:
            if "block" in name:  # equation 103 at t = 1/2
                a, b = x, skipped.pop()
                n, m = a.shape[1], b.shape[1]
                x = ((n + m) / 2) ** 0.5 * torch.cat([a / n**0.5, b / m**0.5], 1)
            x = self.block(name, x, embedding)
        return self.layer("out_conv", x, w["out_gain"])

    def denoised(self, x: Tensor, sigma: float, labels: Tensor | None = None) -> Tensor:
        """Karras et al. 2022, table 1, sigma_data = 0.5."""
        x, total = x.double(), sigma**2 + 0.25
        time = torch.full((len(x),), math.log(sigma) / 4, dtype=torch.float64)
        return 0.25 / total * x + sigma * 0.5 / total**0.5 * self.raw(x / total**0.5, time, labels)


def error(
    prior: Any, by_hand: ByHand, label: Tensor | None = None, rows: Tensor | None = None
) -> float:
    """Of the prior told the label, against the equations told rows of 0 and one 1."""
    worst, condition = 0.0, {} if label is None else {"label": label}
    for sigma in SIGMAS:
        x = torch.randn(2, *prior.shape) * max(1.0, sigma)
        found = prior.denoise(x, sigma, **condition).double()
        worst = max(worst, float((found - by_hand.denoised(x, sigma, rows)).abs().max()))
    return worst


def preconditioned(net: EDM2) -> dict[str, Tensor]:
    """As NVIDIA's Precond has it, with the weights of the uncertainty, which only training uses."""
    extra = {"logvar_fourier.freqs": torch.ones(4), "logvar_linear.weight": torch.ones(1, 4)}
    return {**{f"unet.{k}": v for k, v in net.state_dict().items()}, **extra}


# D is of order one at every level: an absolute 1e-5 is 100 roundings of float32.
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_weights_file(tmp_path: Path, name: str):
    net = network(name)
    by_hand = ByHand(net.state_dict())
    path = tmp_path / "w.pt"
    torch.save({"ema": preconditioned(net)}, path)
    prior = load(path, **HEADS)
    assert prior.shape == (CASES[name].image_channels, CASES[name].size, CASES[name].size)
    told = (torch.tensor([1, 4]), torch.eye(5)[[1, 4]]) if name == "class" else ()
    assert error(prior, by_hand, *told) < 1e-5
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    assert error(load(tmp_path / "w.safetensors", **HEADS), by_hand, *told) < 1e-5
    if not told:
        assert prior.to_data(torch.tensor([-1.0, 1.0])).tolist() == [0.0, 1.0]
        assert error(load(path, **HEADS, res_balance=0.4), by_hand) > 1e-3
        assert error(load(path, **HEADS, sigma_data=1.0), by_hand) > 1e-2
        limited = ByHand(net.state_dict(), limit=0.5)
        assert error(load(path, **HEADS, clip_act=0.5), limited) < 1e-5
        assert error(prior, limited) > 1e-3
    else:
        assert error(prior, by_hand, told[0], told[1].flip(0)) > 1e-3
        with pytest.raises(InputError, match="conditional on one of 5 classes"):
            prior.denoise(torch.zeros(1, 4, 16, 16), 1.0)


@pytest.mark.parametrize("name", CASES)
def test_architecture_is_inferred(name: str):
    assert infer_architecture(network(name).state_dict(), "w.pt") == CASES[name]


# Parameters in millions, as in table 2 of the paper: widths 128 ... 448, and 192 of the smallest of 64 pixels.
@pytest.mark.parametrize(
    ("width", "size", "millions"), [(128, 64, 125), (192, 64, 280), (448, 64, 1523)]
)
def test_released_sizes(width: int, size: int, millions: int):
    channels = tuple(width * k for k in (1, 2, 3, 4))
    a = Architecture(size, 4, channels, (False, False, True, True), 3, width, 4 * width, 1000)
    with torch.device("meta"):
        weights = EDM2(a, Balance()).state_dict()
    assert round(sum(w.numel() for w in weights.values()) / 1e6) == millions
    assert infer_architecture(weights, "w.pt") == a


def test_gradients_reach_x_though_weights_are_frozen(tmp_path: Path):
    net = network("any")
    torch.save(net.state_dict(), tmp_path / "w.pt")
    prior = load(tmp_path / "w.pt", **HEADS).double()
    by_hand = ByHand(net.state_dict())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(x)
    (found,) = torch.autograd.grad(prior.denoise(x, 0.5), x, direction)
    (expected,) = torch.autograd.grad(by_hand.denoised(x, 0.5), x, direction)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    prior.optimise("fp32", memory="low", channels_last=False)
    (again,) = torch.autograd.grad(prior.denoise(x, 0.5), x, direction)
    torch.testing.assert_close(again, expected, rtol=1e-9, atol=1e-9)


def test_half_precision(tmp_path: Path):
    net = network("class")
    torch.save(net.state_dict(), tmp_path / "w.pt")
    prior = load(tmp_path / "w.pt", **HEADS).optimise("bf16")
    told = torch.tensor([1, 4]), torch.eye(5)[[1, 4]]
    # Eight bits: 4e-3 of features of order one, through some 30 layers.
    assert 1e-4 < error(prior, ByHand(net.state_dict()), *told) < 0.1


class ToyAutoencoder(nn.Module):
    """Pictures in [0, 1] to four latents of 8 x 8 pixels: three means and a brightness."""

    config = {"block_out_channels": [1, 1, 1, 1]}

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(3.0))

    def encode(self, x: Tensor) -> Any:
        assert x.min() >= 0
        assert x.max() <= 1
        means = nn.functional.avg_pool2d(x, 8)
        z = self.gain * torch.cat([means, means.mean(1, keepdim=True)], 1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: z))

    def decode(self, z: Tensor) -> Any:
        return SimpleNamespace(
            sample=(z / self.gain)[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)
        )


def test_latents(tmp_path: Path):
    net = network("class")
    torch.save(net.state_dict(), tmp_path / "w.pt")
    prior = load(tmp_path / "w.pt", **HEADS)
    assert (prior.scale, prior.shift) == (1.0, 0.0)
    whole = load(tmp_path / "w.pt", **HEADS, autoencoder=ToyAutoencoder())
    assert isinstance(whole, LatentPrior)
    assert whole.sample_shape == (3, 128, 128)
    picture = torch.rand(1, 3, 16, 16).repeat_interleave(8, 2).repeat_interleave(8, 3)
    latents = whole.to_normalised(picture)
    means = 3 * picture[..., ::8, ::8]
    # To mean 0 and deviation 0.5, from the statistics of the latents of ImageNet that the paper's code states.
    for k, (mean, std) in enumerate([(5.81, 4.17), (3.25, 4.62), (0.12, 3.71)]):
        torch.testing.assert_close(latents[:, k], (means[:, k] - mean) / std * 0.5)
    torch.testing.assert_close(latents[:, 3], (means.mean(1) + 2.15) / 3.28 * 0.5)
    torch.testing.assert_close(whole.to_data(latents), picture)
    label = torch.tensor([2])
    x = torch.randn(1, 4, 16, 16)
    torch.testing.assert_close(
        whole.denoise(x, 0.7, label=label), prior.denoise(x, 0.7, label=label)
    )
    torch.save(network("any").state_dict(), tmp_path / "pixels.pt")
    with pytest.raises(InputError, match="is a network of pixels: leave autoencoder= out"):
        load(tmp_path / "pixels.pt", **HEADS, autoencoder=ToyAutoencoder())


def test_latents_of_an_autoencoder_by_its_folder(tmp_path: Path):
    diffusers = pytest.importorskip("diffusers")
    torch.save(network("class").state_dict(), tmp_path / "w.pt")
    tiny.stable_diffusion(diffusers, tmp_path)
    by_name = load(tmp_path / "w.pt", **HEADS, autoencoder=str(tmp_path / "vae"))
    autoencoder = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    itself = load(tmp_path / "w.pt", **HEADS, autoencoder=autoencoder)
    assert isinstance(by_name, LatentPrior)
    assert by_name.factor == 4
    z = torch.randn(1, 4, 4, 4)
    assert torch.equal(by_name.to_data(z), itself.to_data(z))
    with pytest.raises(InputError, match=r"is UNet2DConditionModel; expected .* AutoencoderKL"):
        load(tmp_path / "w.pt", **HEADS, autoencoder=tmp_path / "unet")
    with pytest.raises(InputError, match=r"vaee is no folder with a config\.json"):
        load(tmp_path / "w.pt", **HEADS, autoencoder="vaee")


def test_what_does_not_fit(tmp_path: Path):
    path, weights = tmp_path / "w.pt", network("any").state_dict()
    torch.save(weights, path)
    with pytest.raises(InputError, match="32 channels cannot be divided into heads of 64"):
        load(path)
    with pytest.raises(
        InputError, match=r"load_prior got res_balnce=, .*did you mean 'res_balance'"
    ):
        load(path, **HEADS, res_balnce=0.3)
    torch.save({k: v for k, v in weights.items() if k != "dec.8x8_up.emb_gain"}, path)
    with pytest.raises(CheckpointError, match=r"1 missing, such as dec\.8x8_up\.emb_gain"):
        load(path, **HEADS)
    torch.save({k: v for k, v in weights.items() if not k.startswith("enc.")}, path)
    with pytest.raises(CheckpointError, match="names of an EDM2 network but not its structure"):
        load(path, **HEADS)
