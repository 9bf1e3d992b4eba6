"""DPS on a checkpoint of each family is DPS by hand: its own network, time, scale and formula of x0, on its own x_t.

A tiny random network is saved as its family saves them and loaded by `load_prior`. By hand, nothing of the package is
called but the random numbers and the raw network: x_t = centre + signal x0 + noise n, in the variables of the family.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import invguide as ig
import tiny
from invguide.operators import Inpainting
from invguide.priors.networks.adm import ADM
from invguide.priors.networks.adm import Architecture as ArchitectureOfADM
from invguide.priors.networks.edm2 import EDM2, Architecture, Balance
from invguide.rng import Noise
from invguide.solvers import DPS
from tiny import randomised

STEPS = (300, 270, 240, 210, 180, 150, 100, 50, 20, 5)  # of the 1000 of DDPM
SIGMAS = (1.0, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
LABELS = torch.tensor([3, 0])  # of the two measurements


class Level(NamedTuple):
    time: float  # as the network is told
    signal: float
    noise: float


X0 = Callable[[Tensor, Level], Tensor]


class Case(NamedTuple):
    """One checkpoint.

    Attributes:
        prior: What `load_prior` makes of it.
        levels: From noise to none, eleven of them.
        x0_of: E[x0 | x_t] by the family.
        wrong: The same with a mistake.
        shape: Of one x_t.
        centre: Of x_t, where x0 is zero.
        decode: x0 to a picture in [0, 1].
        unit: Of x0, in that of pictures; None of latents, for which the step of the released code is not defined.
    """

    prior: ig.Prior
    levels: list[Level]
    x0_of: X0
    wrong: X0
    condition: dict[str, Tensor] = {}
    shape: tuple[int, ...] = (3, 8, 8)
    centre: float = 0.0
    decode: Callable[[Tensor], Tensor] = lambda x0: (x0 + 1) / 2
    unit: float | None = 0.5


def dps_by_hand(case: Case, x0_of: X0, y: Tensor, mask: Tensor, step_size: float) -> Tensor:
    """Algorithm 1 of Chung et al. 2022, with what is measured of the picture, and a gradient by either of its forms.

    Pixels: x_t takes the released code's step, zeta grad |r|. That is meant for z = x_t / |(signal, noise)|, which
    preserves the variance; by the chain rule, x_t moves by the lengths of both levels times as much.
    Latents: grad log p(y | x0(x_t)) is added to the score, and x0 = (x_t + noise^2 score) / signal (Tweedie).
    """
    noise = Noise(0, ((0, 0), (1, 0)), case.shape)
    x_t = case.centre + case.levels[0].noise * noise("init")
    x0 = torch.zeros(())
    for k, (now, after) in enumerate(pairwise(case.levels)):
        x_t = x_t.detach().requires_grad_()
        x0 = x0_of(x_t, now)
        residual = (mask * (y - case.decode(x0))).flatten(1)
        if case.unit:
            (slope,) = torch.autograd.grad(residual.norm(dim=1).sum() / case.unit, x_t)
        else:
            (slope,) = torch.autograd.grad(0.5 * residual.square().sum(), x_t)  # sigma_y = 1
            x0 = x0 - step_size * now.noise**2 / now.signal * slope
        # q(x_after | x_now, x0), since x_now is ratio x_after and fresh noise.
        ratio = now.signal / after.signal
        fresh = now.noise**2 - (ratio * after.noise) ** 2
        mean = after.signal * fresh * x0 + ratio * after.noise**2 * (x_t - case.centre)
        std = math.sqrt(fresh) * after.noise / now.noise
        x_t = case.centre + mean / now.noise**2 + std * noise.at(k)()
        if case.unit:
            lengths = math.hypot(now.signal, now.noise) * math.hypot(after.signal, after.noise)
            x_t = x_t - step_size * lengths * slope
    return case.decode(x0).detach()


def load(*args: Any, **settings: Any) -> Any:
    """Random weights denoise nothing, which load_prior would refuse: unchecked."""
    return ig.load_prior(*args, check=False, **settings)


def times(x_t: Tensor, level: Level) -> Tensor:
    return torch.full((len(x_t),), level.time)


def preserving(bar: np.ndarray) -> list[Level]:
    """x_t = sqrt(abar) x0 + sqrt(1 - abar) n, abar by step."""
    return [
        *(Level(float(t), math.sqrt(bar[t]), math.sqrt(1 - bar[t])) for t in STEPS),
        Level(0, 1, 0),
    ]


EXPLODING = [Level(sigma, 1, sigma) for sigma in (*SIGMAS, 0.0)]  # x_t = x0 + sigma n
LINEAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
SCALED = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
COSINE = np.cos((np.arange(1, 1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
COSINE /= math.cos(0.008 / 1.008 * math.pi / 2) ** 2
TIME = np.arange(1000) / 999
CONTINUOUS = np.exp(-(0.1 * TIME + 0.5 * 19.9 * TIME**2))  # score_sde: beta is 0.1 + 19.9 t


# ---- guided-diffusion


def adm(folder: Path, classes: int | None = None) -> Case:
    """The paper's own: eps in half of the channels, at linear betas."""
    architecture = ArchitectureOfADM(3, 6, 32, (32, 64), (False, True), 1, classes)
    net = randomised(ADM(architecture, num_heads=2, qkv_order="new"))
    torch.save(net.state_dict(), folder / "w.pt")
    legacy = ADM(architecture, num_heads=2, qkv_order="legacy")
    legacy.load_state_dict(net.state_dict())

    def x0_of(x_t: Tensor, at: Level, net: Any = net, label: Tensor = LABELS) -> Tensor:
        told = {"label": label} if classes else {}
        return (x_t - at.noise * net(x_t, times(x_t, at), **told)[:, :3]) / at.signal

    return Case(
        load(folder / "w.pt", num_heads=2, qkv_order="new", shape=(3, 8, 8)),
        preserving(LINEAR),
        x0_of,
        partial(x0_of, **({"label": LABELS.flip(0)} if classes else {"net": legacy.eval()})),
        {"label": LABELS} if classes else {},
    )


# ---- diffusers

PREDICTIONS: dict[str, Callable[[Tensor, Tensor, Level], Tensor]] = {
    "epsilon": lambda x_t, out, at: (x_t - at.noise * out) / at.signal,
    "v_prediction": lambda x_t, out, at: at.signal * x_t - at.noise * out,
    "sample": lambda x_t, out, at: out,
}
BETAS = {"linear": LINEAR, "scaled_linear": SCALED, "squaredcos_cap_v2": COSINE}


def unet(**changed: Any) -> Any:
    config = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    diffusers: Any = pytest.importorskip("diffusers")
    return randomised(diffusers.UNet2DModel(**(config | changed)))


def unet_folder(folder: Path, prediction: str, betas: str, classes: int | None = None) -> Case:
    diffusers: Any = pytest.importorskip("diffusers")
    net = unet(num_class_embeds=classes)
    net.save_pretrained(folder / "unet")
    diffusers.DDPMScheduler(
        beta_schedule=betas, prediction_type=prediction,
        beta_start=0.00085 if betas == "scaled_linear" else 1e-4,
        beta_end=0.012 if betas == "scaled_linear" else 0.02,
    ).save_pretrained(folder / "scheduler")  # fmt: skip

    def x0_of(
        x_t: Tensor, at: Level, label: Tensor | None = LABELS if classes else None,
        prediction: str = prediction, late: int = 0,
    ) -> Tensor:  # fmt: skip
        output = net(x_t, times(x_t, at) + late, class_labels=label).sample
        return PREDICTIONS[prediction](x_t, output, at)

    def without_sqrt_of_abar(x_t: Tensor, at: Level) -> Tensor:
        return at.signal * x0_of(x_t, at)

    wrong: dict[str, X0] = {
        "epsilon": without_sqrt_of_abar,
        "v_prediction": partial(x0_of, prediction="epsilon"),
        "sample": partial(x0_of, late=100),
    }
    return Case(
        load(folder),
        preserving(BETAS[betas]),
        x0_of,
        partial(x0_of, label=LABELS.flip(0)) if classes else wrong[prediction],
        {"label": LABELS} if classes else {},
    )


def ncsnpp_folder(folder: Path) -> Case:
    """score_sde's VE networks as diffusers keeps them: the score at time sigma, pictures in [0, 1]."""
    diffusers: Any = pytest.importorskip("diffusers")
    net = unet(time_embedding_type="fourier")
    net.save_pretrained(folder)
    diffusers.ScoreSdeVeScheduler(sigma_max=50.0).save_pretrained(folder)

    def x0_of(x_t: Tensor, at: Level, sign: int = 1) -> Tensor:
        return x_t + sign * at.noise**2 * net(x_t, times(x_t, at)).sample

    return Case(
        load(folder), EXPLODING, x0_of, partial(x0_of, sign=-1), decode=lambda x0: x0,
        unit=1.0,
    )  # fmt: skip


# ---- latents


def with_autoencoder(folder: Path, **settings: Any) -> dict[str, Any]:
    """Save one of two pixels per latent; what it makes of a Case: pictures are measured, x0 is a scaled latent."""
    diffusers: Any = pytest.importorskip("diffusers")
    vae = randomised(tiny.autoencoder(diffusers, levels=2, **settings))
    vae.save_pretrained(folder / "vae")
    scale, shift = settings["scaling_factor"], settings.get("shift_factor", 0.0)
    return {
        "decode": lambda z: vae.decode(z / scale + shift).sample / 2 + 0.5,
        "shape": (4, 4, 4),
        "unit": None,
    }


def stable_diffusion(folder: Path) -> Case:
    diffusers: Any = pytest.importorskip("diffusers")
    net = randomised(
        tiny.text_unet(diffusers, sample_size=4, block_out_channels=(16, 16), norm_num_groups=8)
    )
    net.save_pretrained(folder / "unet")
    diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).save_pretrained(folder / "scheduler")
    text = 4 * torch.randn(2, 5, 16)

    def x0_of(x_t: Tensor, at: Level, text: Tensor = text) -> Tensor:
        eps = net(x_t, times(x_t, at), encoder_hidden_states=text).sample
        return (x_t - at.noise * eps) / at.signal

    decoded = with_autoencoder(folder, scaling_factor=0.18215)
    wrong = partial(x0_of, text=text.flip(0))
    return Case(load(folder), preserving(SCALED), x0_of, wrong, {"text": text}, **decoded)


def stable_diffusion_xl(folder: Path) -> Case:
    """As its EulerDiscreteScheduler has it: x = x0 + sigma n, divided by sqrt(sigma^2 + 1) for the network."""
    diffusers: Any = pytest.importorskip("diffusers")
    net = randomised(
        tiny.text_unet(
            diffusers,
            sample_size=4,
            block_out_channels=(16, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=12 + 6 * 8,
        )
    )
    net.save_pretrained(folder / "unet")
    diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).save_pretrained(folder / "scheduler")
    text, pooled = torch.randn(2, 5, 16), 4 * torch.randn(2, 12)
    pixels = torch.tensor([[8.0, 8, 0, 0, 8, 8]]).expand(2, 6)

    def x0_of(x: Tensor, at: Level, pooled: Tensor = pooled) -> Tensor:
        eps = net(
            x / math.sqrt(at.noise**2 + 1),
            times(x, at),
            encoder_hidden_states=text,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": pixels},
        ).sample
        return x - at.noise * eps

    levels = [Level(at.time, 1, at.noise / at.signal) for at in preserving(SCALED)]
    decoded = with_autoencoder(folder, scaling_factor=0.13025)
    condition, wrong = {"text": text, "pooled": pooled}, partial(x0_of, pooled=pooled.flip(0))
    return Case(load(folder), levels, x0_of, wrong, condition, **decoded)


def flow(time_scale: float) -> list[Level]:
    """x_t = (1 - t) x0 + t n."""
    return [Level(time_scale * t, 1 - t, t) for t in (*np.linspace(0.8, 0.08, 10).tolist(), 0.0)]


def stable_diffusion_3(folder: Path) -> Case:
    """A velocity n - x0, at time 1000 t."""
    diffusers: Any = pytest.importorskip("diffusers")
    net = randomised(tiny.sd3(diffusers, size=4))
    net.save_pretrained(folder / "transformer")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    text, pooled = torch.randn(2, 3, 16), 4 * torch.randn(2, 12)

    def x0_of(x_t: Tensor, at: Level, pooled: Tensor = pooled) -> Tensor:
        velocity = net(
            x_t, timestep=times(x_t, at), encoder_hidden_states=text, pooled_projections=pooled
        ).sample
        return x_t - at.noise * velocity

    decoded = with_autoencoder(folder, scaling_factor=1.5305, shift_factor=0.0609)
    condition, wrong = {"text": text, "pooled": pooled}, partial(x0_of, pooled=pooled.flip(0))
    return Case(load(folder), flow(1000), x0_of, wrong, condition, **decoded)


def flux(folder: Path) -> Case:
    """The same at time t, of tokens: squares of 2 x 2 latents and the place of each."""
    diffusers: Any = pytest.importorskip("diffusers")
    net = randomised(
        diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=12,
            axes_dims_rope=(4, 6, 6),
        )
    )
    net.save_pretrained(folder / "transformer")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    text, pooled = torch.randn(2, 3, 16), torch.randn(2, 12)
    places = torch.tensor([[0.0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]])

    def x0_of(x_t: Tensor, at: Level, order: tuple[int, ...] = (0, 2, 4, 1, 3, 5)) -> Tensor:
        squares = x_t.reshape(2, 4, 2, 2, 2, 2).permute(order)  # (B, row, column, 4, 2, 2)
        velocity = net(
            squares.reshape(2, 4, 16),
            timestep=times(x_t, at),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            txt_ids=torch.zeros(3, 3),
            img_ids=places,
        ).sample
        back = velocity.reshape(squares.shape).permute(*np.argsort(order).tolist())
        return x_t - at.noise * back.reshape(x_t.shape)

    decoded = with_autoencoder(folder, scaling_factor=0.3611, shift_factor=0.1159)
    condition, wrong = {"text": text, "pooled": pooled}, partial(x0_of, order=(0, 2, 4, 3, 5, 1))
    return Case(load(folder), flow(1), x0_of, wrong, condition, **decoded)


def pixart(folder: Path) -> Case:
    """eps in half of the channels; some of the text is masked."""
    diffusers: Any = pytest.importorskip("diffusers")
    net = randomised(
        diffusers.PixArtTransformer2DModel(
            sample_size=4,
            patch_size=2,
            num_layers=1,
            num_attention_heads=3,
            attention_head_dim=8,
            cross_attention_dim=24,
            caption_channels=16,
            use_additional_conditions=False,
        )
    )
    net.save_pretrained(folder / "transformer")
    diffusers.DDIMScheduler().save_pretrained(folder / "scheduler")
    text, mask = 4 * torch.randn(2, 5, 16), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])

    def x0_of(x_t: Tensor, at: Level, mask: Tensor = mask) -> Tensor:
        output = net(
            x_t,
            timestep=times(x_t, at),
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        return (x_t - at.noise * output[:, :4]) / at.signal

    decoded = with_autoencoder(folder, scaling_factor=0.18215)
    condition, wrong = {"text": text, "text_mask": mask}, partial(x0_of, mask=torch.ones(2, 5))
    return Case(load(folder), preserving(LINEAR), x0_of, wrong, condition, **decoded)


def dit(folder: Path) -> Case:
    """Without its autoencoder: latents are measured as they are."""
    diffusers: Any = pytest.importorskip("diffusers")
    net = randomised(tiny.dit(diffusers, num_layers=1, sample_size=4))
    net.save_pretrained(folder / "transformer")
    diffusers.DDIMScheduler().save_pretrained(folder / "scheduler")

    def x0_of(x_t: Tensor, at: Level, label: Tensor = LABELS) -> Tensor:
        eps = net(x_t, timestep=times(x_t, at), class_labels=label).sample[:, :4]
        return (x_t - at.noise * eps) / at.signal

    wrong = partial(x0_of, label=torch.tensor([5, 5]))  # the class that stands for any
    return Case(
        load(folder), preserving(LINEAR), x0_of, wrong, {"label": LABELS}, shape=(4, 4, 4),
        decode=lambda x0: x0, unit=1.0,
    )  # fmt: skip


# ---- EDM, EDM2


def preconditioned(
    raw: Callable[[Tensor, Tensor], Tensor], x: Tensor, at: Level, sigma_data: float = 0.5
) -> Tensor:
    """Karras et al. 2022, table 1."""
    total = at.noise**2 + sigma_data**2
    c_skip, c_out = sigma_data**2 / total, at.noise * sigma_data / math.sqrt(total)
    c_in, c_noise = 1 / math.sqrt(total), math.log(at.noise) / 4
    return c_skip * x + c_out * raw(c_in * x, torch.full((len(x),), c_noise))


def edm(folder: Path, network: str, column: str) -> Case:
    """One of its networks as InverseBench keeps them, under each column of that table."""
    models: Any = pytest.importorskip("deepinv.models")
    arguments: dict[str, Any] = {
        "img_resolution": 8,
        "in_channels": 3,
        "out_channels": 6 if column == "iddpm" else 3,
        "label_dim": 4,
        "augment_dim": 0,
        "model_channels": 128,
        "channel_mult": (1,),
        "num_blocks": 1,
        "attn_resolutions": [8],
        "pretrained": None,
    }
    adm = network == "adm"
    net = randomised(models.ADMUNet(**arguments) if adm else models.NCSNpp(network, **arguments))
    torch.save({"ema": {f"model.{k}": v for k, v in net.state_dict().items()}}, folder / "w.pt")

    def x0_of(x_t: Tensor, at: Level, label: Tensor = LABELS) -> Tensor:
        raw = partial(net.forward_unet, class_labels=torch.eye(4)[label])
        if column == "edm":
            return preconditioned(raw, x_t, at)
        if column == "ve":
            return x_t + at.noise * raw(x_t, (times(x_t, at) / 2).log())
        return (x_t - at.noise * raw(x_t, times(x_t, at))[:, :3]) / at.signal

    levels = {
        "edm": EXPLODING,
        "ve": EXPLODING,
        "vp": preserving(CONTINUOUS),
        "iddpm": preserving(COSINE),
    }
    prior = load(folder / "w.pt", **({} if adm else {"precondition": column}))
    wrong = partial(x0_of, label=LABELS.flip(0))
    return Case(prior, levels[column], x0_of, wrong, {"label": LABELS})


def edm2(folder: Path) -> Case:
    a = Architecture(8, 3, (32, 32), (False, True), 1, 16, 32, num_classes=4)
    net: Any = EDM2(a, Balance(channels_per_head=16))
    for p in net.parameters():  # rows of weights are normalised: gains are the scale
        nn.init.normal_(p, float(p.ndim == 0))
    net.eval().requires_grad_(False)
    torch.save({f"unet.{k}": v for k, v in net.state_dict().items()}, folder / "w.pt")

    def x0_of(x: Tensor, at: Level, sigma_data: float = 0.5) -> Tensor:
        raw = partial(net, class_labels=torch.eye(4)[LABELS])
        return preconditioned(raw, x, at, sigma_data)

    return Case(
        load(folder / "w.pt", channels_per_head=16), EXPLODING, x0_of,
        partial(x0_of, sigma_data=1.0), {"label": LABELS},
    )  # fmt: skip


# ---- deepinv, score_sde


def drunet(folder: Path) -> Case:
    """A denoiser of pictures in [0, 1], of which sigma is a part: x_t is 1/2 + x0 / 2 + noise n."""
    models: Any = pytest.importorskip("deepinv.models")
    make = partial(models.DRUNet, 3, 3, nc=[8, 8, 8, 8], nb=1, pretrained=None)
    net = make().eval().requires_grad_(False)
    for p in net.parameters():  # it has no norms: the usual weights make a black picture
        nn.init.kaiming_normal_(p, nonlinearity="linear")
    net.m_tail.weight *= 0.4
    torch.save(net.state_dict(), folder / "w.pt")

    def x0_of(x_t: Tensor, at: Level, double: int = 1) -> Tensor:
        return 2 * net(x_t, double * times(x_t, at)) - 1

    return Case(
        load(make(), weights=folder / "w.pt", sigma_max=10.0, shape=(3, 8, 8)),
        [Level(sigma, 0.5, sigma) for sigma in (*SIGMAS, 0.0)],
        x0_of,
        partial(x0_of, double=2),
        centre=0.5,
    )


class Net(nn.Module):
    """As small as a network with a time can be."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.into = nn.Linear(2, 32), nn.Conv2d(3, 32, 3, padding=1)
        self.out = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        features = self.time(torch.stack([time.log(), time.log().sin()], 1))
        return self.out(nn.functional.silu(self.into(x) + features[:, :, None, None]))


class ScoreVE(Net):
    """score_sde's get_score_fn, for VE: the network is told sigma, and its output divided by it."""

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return super().forward(x, sigma) / sigma[:, None, None, None]


class ScoreVP(Net):
    """The same for VP: told 999 t, divided by minus the deviation."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        std = (1 - torch.exp(-(0.1 * t + 0.5 * 19.9 * t**2))).sqrt()
        return -super().forward(x, 999 * t) / std[:, None, None, None]


def score_ve(folder: Path) -> Case:
    net = randomised(ScoreVE())
    torch.save({"model": net.state_dict()}, folder / "w.pth")

    def x0_of(x_t: Tensor, at: Level, power: int = 1) -> Tensor:
        return x_t + at.noise**power * Net.forward(net, x_t, times(x_t, at))

    prior = load(
        ScoreVE(), weights=folder / "w.pth", predicts="score", schedule="ve", shape=(3, 8, 8)
    )
    return Case(prior, EXPLODING, x0_of, partial(x0_of, power=2))


def score_vp(folder: Path) -> Case:
    net = randomised(ScoreVP())
    torch.save({"model": net.state_dict()}, folder / "w.pth")
    prior = load(
        ScoreVP(), weights=folder / "w.pth", predicts="score", shape=(3, 8, 8),
        schedule=torch.from_numpy(CONTINUOUS), time_scale=1 / 999,
    )  # fmt: skip
    levels = preserving(CONTINUOUS)

    def x0_of(x_t: Tensor, at: Level, signal: float | None = None) -> Tensor:
        return (x_t - at.noise * Net.forward(net, x_t, times(x_t, at))) / (signal or at.signal)

    return Case(prior, levels, x0_of, partial(x0_of, signal=1.0))


FAMILIES: dict[str, Callable[[Path], Case]] = {
    "adm": adm,
    "adm-class": partial(adm, classes=4),
    "unet-epsilon-linear": partial(unet_folder, prediction="epsilon", betas="linear"),
    "unet-v-scaled": partial(unet_folder, prediction="v_prediction", betas="scaled_linear"),
    "unet-sample-cosine": partial(unet_folder, prediction="sample", betas="squaredcos_cap_v2"),
    "unet-class": partial(unet_folder, prediction="epsilon", betas="linear", classes=4),
    "ncsnpp-folder": ncsnpp_folder,
    "stable-diffusion": stable_diffusion,
    "stable-diffusion-xl": stable_diffusion_xl,
    "stable-diffusion-3": stable_diffusion_3,
    "flux": flux,
    "pixart": pixart,
    "dit": dit,
    "edm": partial(edm, network="adm", column="edm"),
    "edm-vp": partial(edm, network="ddpm", column="vp"),
    "edm-ve": partial(edm, network="ncsn", column="ve"),
    "edm-iddpm": partial(edm, network="adm", column="iddpm"),
    "edm2": edm2,
    "deepinv-drunet": drunet,
    "score-ve": score_ve,
    "score-vp": score_vp,
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_dps(family: str, tmp_path: Path):
    case = FAMILIES[family](tmp_path)
    picture = case.decode(torch.zeros(1, *case.shape)).shape[1:]
    mask = (torch.rand(1, *picture[1:]) < 0.5).float()
    y = mask * torch.rand(2, *picture)
    step_size = 0.4 if case.unit else 4.0
    solver = DPS(
        num_steps=10,
        guidance_scale=step_size,
        weight="official" if case.unit else "likelihood",
        schedule=tuple(level.noise / level.signal for level in case.levels),
    )
    found = ig.solve(
        y, Inpainting(mask=mask), case.prior, sigma_y=1.0, solver=solver, condition=case.condition,
        seed=0, device="cpu",
    ).samples[:, 0]  # fmt: skip

    def error(x0_of: X0, step_size: float) -> float:
        expected = dps_by_hand(case, x0_of, y, mask, step_size)
        return float((found - expected).abs().max() / expected.std())

    # float32: ten calls of a network and ten gradients, each with some 1e-7 of its size; 1e-6 to 5e-6 in the end.
    assert error(case.x0_of, step_size) < 1e-4
    assert error(case.wrong, step_size) > 1e-2
    assert error(case.x0_of, 0.0) > 1e-2
