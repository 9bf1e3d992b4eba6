"""What `load_prior` takes, and public checkpoints that many have, each with the line that loads it."""

from __future__ import annotations

from dataclasses import dataclass

from invguide.priors.checkpoints.adm import PRESETS


@dataclass(frozen=True)
class Entry:
    """One line of `invguide priors`; `line` is Python after `import invguide as ig`."""

    name: str
    line: str
    description: str


RECOGNISED = (
    Entry(
        "guided-diffusion (ADM)",
        "ig.load_prior('mine.pt', num_head_channels=64, qkv_order='legacy')",
        "A weights file of OpenAI's network or of its descendants (DPS, ILVR, P2); the architecture is read off the "
        "file. What the file cannot tell is told by preset=, or by num_heads= or num_head_channels=, qkv_order= and "
        "schedule=.",
    ),
    Entry(
        "EDM (DhariwalUNet, SongUNet)",
        "ig.load_prior('fwi-5m.pt')",
        "A weights file of one of EDM's networks, such as those of InverseBench, or EDM's own .pkl, which tells all. "
        "Of a SongUNet's weights, precondition='edm', 'vp', 've' or 'iddpm' is to be told; sigma_data=0.5 and "
        "data_range=(-1, 1) unless told.",
    ),
    Entry(
        "EDM2",
        "ig.load_prior('edm2.pkl')",
        "EDM2's own .pkl, or the weights of its network. Of a latent one, autoencoder='stabilityai/sd-vae-ft-mse' (a "
        "hub id or folder) makes operators and results pictures; without it they are latents.",
    ),
    Entry(
        "diffusers",
        "ig.load_prior('folder/')",
        "A folder or hub id with a UNet2DModel, class-conditional or not; its scheduler says what it predicts "
        "(epsilon, v_prediction, sample, score, flow). Needs: pip install 'invguide[diffusers]'.",
    ),
    Entry(
        "latent diffusion (diffusers)",
        "ig.load_prior('folder/')",
        "A folder or hub id with a UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel, SD3Transformer2DModel, "
        "FluxTransformer2DModel or PixArtTransformer2DModel and its vae/ or vqvae/: operators and results are images. "
        "Text is told by condition=ig.priors.embed_text('folder/', 'a cat'), or --prompt 'a cat', where text encoders "
        "lie beside it; an error lists what else a network needs. Any other autoencoder: "
        "ig.priors.LatentPrior(prior, autoencoder, scaling_factor=..., factor=8).",
    ),
    Entry(
        "deepinv",
        "ig.load_prior(deepinv.models.NCSNpp(pretrained='download'))",
        "Any deepinv.models.Denoiser. Plain image denoisers are only trusted up to 50 grey levels of noise, unless "
        "sigma_max= is told.",
    ),
    Entry(
        "any network",
        "ig.load_prior(net, weights='mine.pt', predicts='eps', schedule='linear-vp')",
        "A module net(x, time): noise, x0, v, score or flow; VP, VE, EDM or flow schedule, or your own table. "
        "Every weight of the file must fit.",
    ),
)

TEXT = "conditional on text"
POOLED = "conditional on text and pooled"
PUBLIC = (
    *(
        Entry(
            preset.name,
            f"ig.load_prior('{preset.files[0]}.pt')",
            f"{preset.description[0].upper()}{preset.description[1:]}, {preset.size} x {preset.size}. Under another "
            f"file name: preset='{preset.name}'.",
        )
        for preset in PRESETS.values()
    ),
    *(
        Entry(f"NVIDIA {name}", f"ig.load_prior('{name}.pkl')", f"{what}.")
        for name, what in (
            ("edm-ffhq-64x64-uncond-vp", "Faces, 64 x 64, of EDM; also -ve"),
            ("edm-afhqv2-64x64-uncond-vp", "Animal faces, 64 x 64, of EDM; also -ve"),
            ("edm-cifar10-32x32-cond-vp", "CIFAR-10 by class, of EDM; also -uncond, -ve"),
            ("edm-imagenet-64x64-cond-adm", "ImageNet by class, 64 x 64, of EDM"),
            ("baseline-cifar10-32x32-uncond-vp", "CIFAR-10 of score_sde; also -ve"),
            ("baseline-imagenet-64x64-cond-adm", "ImageNet by class, 64 x 64, of OpenAI"),
            (
                "edm2-img64-s-1073741-0.075",
                "ImageNet by class, 64 x 64, of EDM2; also -m-2147483-0.060, -l-1073741-0.040, -xl-0671088-0.040",
            ),
            (
                "edm2-img512-s-2147483-0.130",
                "ImageNet by class, 512 x 512, of EDM2, latent: pass autoencoder= for pictures; also -xs, -m, -l, -xl, "
                "-xxl and -uncond, each under its own numbers",
            ),
        )
    ),
    *(
        Entry(name, f"ig.load_prior('{name}')", f"{what}, from the Hugging Face hub.")
        for name, what in (
            ("google/ddpm-celebahq-256", "Faces, 256 x 256"),
            ("google/ddpm-bedroom-256", "Bedrooms, 256 x 256"),
            ("google/ddpm-church-256", "Churches, 256 x 256"),
            ("google/ddpm-cat-256", "Cats, 256 x 256"),
            ("google/ddpm-cifar10-32", "CIFAR-10, 32 x 32"),
            ("CompVis/ldm-celebahq-256", "Faces, 256 x 256, latent"),
            ("facebook/DiT-XL-2-256", "ImageNet by class or any, 256 x 256, latent"),
            ("stable-diffusion-v1-5/stable-diffusion-v1-5", f"512 x 512, latent, {TEXT}"),
            ("stabilityai/stable-diffusion-xl-base-1.0", f"1024 x 1024, latent, {POOLED}"),
            ("stabilityai/stable-diffusion-3-medium-diffusers", f"1024 x 1024, latent, {POOLED}"),
            ("PixArt-alpha/PixArt-XL-2-512x512", f"512 x 512, latent, {TEXT} and text_mask"),
            (
                "black-forest-labs/FLUX.1-schnell",
                f"1024 x 1024, latent, {POOLED}; distilled to few steps, so that D is not quite E[x0 | x]",
            ),
            (
                "black-forest-labs/FLUX.1-dev",
                f"1024 x 1024, latent, {POOLED}, and guidance, for which it was distilled: D leans towards the text",
            ),
        )
    ),
    *(
        Entry(
            f"deepinv {name}",
            f"ig.load_prior(deepinv.models.{name}(pretrained='download'))",
            f"{what}, downloaded by deepinv.",
        )
        for name, what in (
            ("DiffUNet", "The faces of ffhq-256"),
            ("NCSNpp", "Faces, 64 x 64, of EDM"),
            ("ADMUNet", "ImageNet by class, 64 x 64, of EDM"),
            ("DRUNet", "An image denoiser, any size"),
        )
    ),
)
