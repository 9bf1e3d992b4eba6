"""Priors over latents: models of diffusers give their family's own E[z0 | z], and images are decoded in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import invguide as ig
import tiny
from invguide.errors import CheckpointError, InputError, ShapeError
from invguide.likelihood import Likelihood
from invguide.operators import Identity, Inpainting, SuperResolution
from invguide.priors import Gaussian, LatentPrior, Tiled, from_network
from invguide.priors.checkpoints.diffusers_folder import weight_files
from invguide.priors.checkpoints.diffusers_models import as_network
from invguide.problem.problem import Problem
from invguide.solvers import DPS, HQS, REDDiff

T = 1000
STEPS = (3, 150, 500, 800, 990)


pytestmark = pytest.mark.usefixtures("unchecked")


def at_steps(
    prior: ig.Prior, betas: Tensor, x0_of: Any, steps: tuple[int, ...] = STEPS, **condition: Tensor
) -> float:
    """Largest difference from the family's own clean estimate, at five of its own steps and in its own coordinates."""
    products = (1 - betas.double()).cumprod(0)
    worst = 0.0
    for t in steps:
        alpha, noise = float(products[t].sqrt()), float((1 - products[t]).sqrt())
        x_t = torch.randn(2, *(size or 8 for size in prior.shape))
        found = prior.denoise(x_t / alpha, noise / alpha, **condition)
        expected = x0_of(x_t, torch.full((2,), t), alpha, noise)
        # An estimate is the network's output times noise / alpha, up to 150; float32 errs relative to that.
        worst = max(worst, float((found - expected).abs().max()) * alpha)
    return worst


LINEAR = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
SCALED = torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2


@pytest.mark.slow
def test_class_conditional_transformer(diffusers: Any, tmp_path: Path):
    """DiT: noise and variance in one output, classes, and a null class where none is told."""
    net = tiny.filled(tiny.dit(diffusers))
    net.save_pretrained(tmp_path / "transformer")
    diffusers.DDIMScheduler(beta_schedule="linear").save_pretrained(tmp_path / "scheduler")
    prior = ig.load_prior(tmp_path)
    assert prior.shape == (4, 8, 8)
    label = torch.tensor([3, 0])

    def x0_of(x_t: Tensor, t: Tensor, alpha: float, noise: float, label: Tensor = label) -> Tensor:
        eps = net(x_t, timestep=t, class_labels=label).sample[:, :4]
        return (x_t - noise * eps) / alpha

    assert at_steps(prior, LINEAR, x0_of, label=label) < 1e-5
    assert at_steps(prior, LINEAR, x0_of, label=label.flip(0)) > 1e-3
    null = torch.tensor([5, 5])
    assert at_steps(prior, LINEAR, lambda *a: x0_of(*a, label=null)) < 1e-5
    with pytest.raises(InputError, match="class indices from 0 to 5"):
        prior.denoise(torch.zeros(2, 4, 8, 8), 1.0, label=torch.tensor([0, 6]))
    named = as_network(net)
    told = from_network(named, "eps", "linear-vp", (4, 8, 8))
    z = torch.ones(2, 4, 8, 8)
    assert torch.equal(prior.denoise(z, 1.0), told.denoise(z, 1.0))


def test_positions_are_not_left_empty(diffusers: Any, tmp_path: Path):
    """DiT computes its positions when it is built; the file has none, and other positions give another network."""
    net = tiny.filled(tiny.dit(diffusers))
    net.save_pretrained(tmp_path)
    diffusers.DDIMScheduler().save_pretrained(tmp_path)
    loaded: Any = ig.load_prior(tmp_path)
    found = loaded.net.net.pos_embed.pos_embed
    assert torch.equal(found, net.pos_embed.pos_embed)
    assert found.abs().max() > 0.5


@pytest.mark.parametrize("steps", [1000, 500])
def test_flow_transformer(diffusers: Any, tmp_path: Path, steps: int):
    """Velocity n - z0 at z_t = (1 - t) z0 + t n and time steps * t: D = z_t - t v."""
    net = tiny.filled(tiny.dit(diffusers, out_channels=4))
    net.save_pretrained(tmp_path / "transformer")
    flow = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps, shift=3.0)
    flow.save_pretrained(tmp_path / "scheduler")
    prior = ig.load_prior(tmp_path)
    for sigma in (0.02, 0.3, 1.0, 5.0, 50.0):
        z, t = torch.randn(2, 4, 8, 8) * max(1, sigma), sigma / (1 + sigma)
        z_t = z * (1 - t)
        label = torch.tensor([1, 4])
        velocity = net(z_t, timestep=torch.full((2,), steps * t), class_labels=label).sample
        error = (prior.denoise(z, sigma, label=label) - (z_t - t * velocity)).abs().max()
        assert float(error) < 1e-5 * max(1, sigma)
        wrong = (prior.denoise(z, sigma, label=label) - (z_t + t * velocity)).abs().max()
        assert float(wrong) > 1e-3


def test_flow_transformer_with_text(diffusers: Any, tmp_path: Path):
    """Stable Diffusion 3: two embeddings of the text, any size."""
    net = tiny.filled(tiny.sd3(diffusers))
    net.save_pretrained(tmp_path / "transformer")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    prior = ig.load_prior(tmp_path)
    assert prior.shape == (4, None, None)
    text, pooled = torch.randn(2, 3, 16), torch.randn(2, 12)
    for size in (8, 12):
        z, t = torch.randn(2, 4, size, 8), 0.5
        velocity = net(
            z * t,
            timestep=torch.full((2,), 500.0),
            encoder_hidden_states=text,
            pooled_projections=pooled,
        ).sample
        found = prior.denoise(z, 1.0, text=text, pooled=pooled)
        assert float((found - (z * t - t * velocity)).abs().max()) < 1e-5
    needed = r"conditional on text \(B, n, 16\), pooled \(B, 12\), .*; got text \(2, 3, 16\): pass"
    with pytest.raises(InputError, match=needed):
        prior.denoise(torch.zeros(2, 4, 8, 8), 1.0, text=text)


# ---- Stable Diffusion: a network, an autoencoder and a scheduler


@pytest.fixture
def stable_diffusion(diffusers: Any, tmp_path: Path) -> tuple[Path, Any, Any]:
    # One channel in a group would normalise the time away.
    net = tiny.filled(tiny.text_unet(diffusers, block_out_channels=(32, 32), norm_num_groups=8))
    vae = tiny.filled(
        tiny.autoencoder(diffusers, channels=32, norm_num_groups=32, shift_factor=0.1)
    )
    net.save_pretrained(tmp_path / "unet")
    vae.save_pretrained(tmp_path / "vae")
    diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
    ).save_pretrained(tmp_path / "scheduler")
    return tmp_path, net, vae


def test_stable_diffusion_folder(stable_diffusion: tuple[Path, Any, Any]):
    folder, net, vae = stable_diffusion
    prior = ig.load_prior(folder)
    assert isinstance(prior, LatentPrior)
    assert prior.shape == (4, None, None)
    assert (prior.factor, prior.scaling_factor, prior.shift_factor) == (4, 0.18215, 0.1)
    text = torch.randn(2, 5, 16)

    def x0_of(x_t: Tensor, t: Tensor, alpha: float, noise: float) -> Tensor:
        return alpha * x_t - noise * net(x_t, t, encoder_hidden_states=text).sample

    assert at_steps(prior, SCALED, x0_of, text=text) < 1e-5
    assert at_steps(prior, LINEAR, x0_of, (150, 500), text=text) > 1e-3
    with pytest.raises(InputError, match=r"conditional on text .* got nothing"):
        prior.denoise(torch.zeros(1, 4, 8, 8), 1.0)

    z, x = torch.randn(2, 4, 4, 6), torch.rand(2, 3, 16, 24)
    decoded = vae.decode(z / 0.18215 + 0.1).sample / 2 + 0.5
    torch.testing.assert_close(prior.to_data(z), decoded)
    encoded = (vae.encode(2 * x - 1).latent_dist.mean - 0.1) * 0.18215
    torch.testing.assert_close(prior.to_normalised(x), encoded)
    floor = ((prior.to_data(encoded) - x) ** 2).mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(prior.floor(x), floor)
    assert len(prior.floor()) >= 2  # of the photograph
    assert (prior.data_shape((4, 4, 6)), prior.normalised_shape((3, 16, 24))) == ((3, 16, 24), (4, 4, 6))  # fmt: skip
    assert prior.sample_shape == (3, None, None)
    assert weight_files(folder) == tuple(
        folder / part / "diffusion_pytorch_model.safetensors" for part in ("unet", "vae")
    )


@pytest.mark.slow
def test_stable_diffusion_restores(stable_diffusion: tuple[Path, Any, Any]):
    """Measurements and results are images; the weights are random, so only the bookkeeping is looked at."""
    prior = ig.load_prior(stable_diffusion[0])
    assert isinstance(prior, LatentPrior)
    y = torch.rand(1, 3, 8, 8)
    condition = {"text": torch.randn(1, 5, 16)}
    for solver in (DPS(num_steps=3), REDDiff(num_steps=3), HQS(num_steps=2)):
        result = ig.solve(
            y, SuperResolution(2, "box"), prior, sigma_y=0.1, solver=solver, num_samples=2,
            condition=condition, seed=0,
        )  # fmt: skip
        assert result.samples.shape == (1, 2, 3, 16, 16)
        assert bool(result.samples.isfinite().all())
        residual = y - SuperResolution(2, "box")(result.samples[0, :1])
        chi2 = float((residual / 0.1).square().mean())
        assert float(result.chi2[0, 0]) == pytest.approx(chi2, rel=1e-3)


def test_a_weight_of_the_autoencoder_that_is_missing_is_an_error(
    stable_diffusion: tuple[Path, Any, Any],
):
    from safetensors.torch import load_file, save_file

    file = stable_diffusion[0] / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["decoder.conv_in.weight"]
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=r"1 missing, such as decoder\.conv_in\.weight"):
        ig.load_prior(stable_diffusion[0])


def test_without_an_autoencoder_the_prior_is_over_the_latents(
    stable_diffusion: tuple[Path, Any, Any],
):
    folder = stable_diffusion[0]
    (folder / "vae").rename(folder / "elsewhere")
    prior = ig.load_prior(folder)
    assert not isinstance(prior, LatentPrior)
    assert (prior.scale, prior.shift, prior.sigma_data) == (1.0, 0.0, 1.0)


# ---- the change of coordinates, against what is known without diffusers


class Shuffle(nn.Module):
    """An autoencoder that loses nothing: four pixels per latent, and a nonlinearity that a decoder has."""

    def __init__(self, bend: float = 0.0) -> None:
        super().__init__()
        self.bend = nn.Parameter(torch.tensor(bend))

    def decode(self, z: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(z + self.bend * z**3, 2)

    def encode(self, x: Tensor) -> Tensor:
        assert float(self.bend) == 0
        return nn.functional.pixel_unshuffle(x, 2)


def pair(bend: float = 0.0) -> tuple[LatentPrior, Gaussian, Tensor]:
    """A Gaussian prior of 2 x 4 images, once over latents (4, 1, 2) and once over the pixels themselves."""
    root = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    covariance = 0.1 * root @ root.mT / 8 + 0.02 * torch.eye(8)
    latent = Gaussian(torch.zeros(4, 1, 2), covariance)
    order = nn.functional.pixel_shuffle(torch.arange(8.0).reshape(1, 4, 1, 2), 2).long().flatten()
    pixels = Gaussian(torch.zeros(1, 2, 4), covariance[order][:, order], scale=0.5, shift=0.5)
    decoded = LatentPrior(latent, Shuffle(bend).double(), scaling_factor=1, factor=2, channels=1)
    return decoded, pixels, order


@pytest.mark.parametrize("observed", [True, False])
def test_an_isometric_decoder_changes_nothing(observed: bool):
    """Denoised, gradients and proximal points of latents are those of the pixels that they stand for."""
    decoded, pixels, order = pair()
    operator = Identity()
    if not observed:
        operator = Inpainting(torch.tensor([[1.0, 0, 1, 1], [1, 1, 0, 1]]).double())
    y = operator(torch.rand(3, 1, 2, 4, dtype=torch.float64))
    likelihood = Likelihood(operator, y, 0.1)
    through, plain = Problem(decoded, likelihood), Problem(pixels, likelihood)
    assert (through.shape, through.data_shape) == ((4, 1, 2), (1, 2, 4))
    assert (through.linear, plain.linear) == (False, True)
    assert (through.sigma_y is None, plain.sigma_y is None) == (True, False)
    z = torch.randn(3, 4, 1, 2, dtype=torch.float64)

    def picture(v: Tensor) -> Tensor:
        return v.flatten(1)[:, order].reshape(-1, 1, 2, 4)

    for ours, theirs in zip(through.guide(z, 0.3), plain.guide(picture(z), 0.3), strict=True):
        theirs_shaped = theirs
        ours_shaped = picture(ours) if ours.ndim > 1 else ours
        torch.testing.assert_close(ours_shaped, theirs_shaped)
    # Through a decoder, the proximal point is found by descent: 20 steps from z.
    found, exact = picture(through.prox(z, 0.3)), plain.prox(picture(z), 0.3)
    torch.testing.assert_close(found, exact, atol=1e-4, rtol=0)
    assert (exact - picture(z)).abs().max() > 0.1


def test_gradients_pass_through_a_bent_decoder():
    decoded, _, _ = pair(bend=0.3)
    y = torch.rand(2, 1, 2, 4, dtype=torch.float64)
    problem = Problem(decoded, Likelihood(Identity(), y, 0.2))
    z = torch.randn(2, 4, 1, 2, dtype=torch.float64)

    def log_prob(v: Tensor) -> Tensor:
        d = decoded.prior.denoise(v, 0.5)
        image = (nn.functional.pixel_shuffle(d + 0.3 * d**3, 2) + 1) / 2
        return -0.5 * ((y - image) / 0.2).square().sum()

    expected = torch.func.grad(log_prob)(z)
    torch.testing.assert_close(problem.guide(z, 0.5).gradient, expected)
    straight = Problem(pair()[0], problem.likelihood).guide(z, 0.5).gradient
    assert (straight - expected).abs().max() > 1e-2  # the test can fail


def test_what_does_not_fit_is_said():
    latent = from_network(lambda x, t: x, "x0", "ve", (4, None, None))
    with pytest.raises(InputError, match="Shuffle does not tell how its latents are scaled"):
        LatentPrior(latent, Shuffle())
    prior = LatentPrior(latent, Shuffle(), scaling_factor=1.0, factor=2, channels=1)
    y = torch.rand(1, 1, 5, 4)
    with pytest.raises(ShapeError, match=r"multiples of 2; got \(1, 5, 4\): crop"):
        Problem(prior, Likelihood(Identity(), y, 0.1))
    official = REDDiff(num_steps=2, weight="official")
    with pytest.raises(InputError, match="in pixels, not latents"):
        ig.solve(torch.rand(1, 1, 4, 4), Identity(), prior, sigma_y=0.1, solver=official)
    prior.train()
    assert not any(part.training for part in prior.modules())


@pytest.mark.parametrize("inside", [True, False])
def test_in_tiles(inside: bool):
    """Of the latents, whether the prior of the latents or all of it is put in tiles."""
    latent = from_network(lambda x, t: x.tanh(), "x0", "ve", (4, None, None))
    scaled = {"scaling_factor": 1.0, "factor": 2, "channels": 1}
    prior = LatentPrior(latent, Shuffle(), **scaled)
    tiled = LatentPrior(Tiled(latent, 8), Shuffle(), **scaled) if inside else Tiled(prior, 8)
    z = torch.randn(1, 4, 12, 20)
    torch.testing.assert_close(tiled.denoise(z, 1.0), prior.denoise(z, 1.0))
    torch.testing.assert_close(tiled.to_data(z), prior.to_data(z))
    assert tiled.data_shape((4, 12, 20)) == (1, 24, 40)


def test_the_doctor_looks_at_latents():
    """The network inside is examined on the latents of the images, in which its convention is right or wrong."""
    exact = Gaussian(torch.zeros(4, 4, 4), torch.eye(64)).float()

    def net(x_t: Tensor, t: Tensor) -> Tensor:
        noise = t.reshape(-1, 1, 1, 1)  # flow: x_t = (1 - t) z0 + t n
        sigma = (noise / (1 - noise).clamp_min(1e-3)).clamp(1e-3, 50)
        x0 = exact.denoise(x_t * (1 + sigma), sigma.flatten())
        return (x_t * (1 + sigma) - x0) / sigma - x0

    images = torch.randn(16, 1, 8, 8) / 2 + 0.5
    right = from_network(net, "flow", "flow", (4, 4, 4), data_range=(0, 1))
    wrong = from_network(net, "eps", "flow", (4, 4, 4), data_range=(0, 1))
    for inside, fits in ((right, True), (wrong, False)):
        prior = LatentPrior(inside, Shuffle(), scaling_factor=1.0, factor=2, channels=1)
        report: Any = prior.check(images)
        assert report.fits == fits, report
        assert report.best.predicts == "flow"
