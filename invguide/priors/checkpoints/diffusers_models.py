"""Networks of diffusers as net(x, time, **condition): one name for each condition, whatever the class calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invguide.errors import InputError
from invguide.priors.networks.conditions import Conditional, Sized
from invguide.priors.networks.labels import WithLabels, check_label

DISTILLED_GUIDANCE = 3.5  # what FLUX.1-dev is told where nobody says otherwise
SIZES = 6  # numbers by which SDXL is told of sizes


@dataclass(frozen=True)
class Kind:
    """A class of diffusers.

    Attributes:
        wrap: Makes net(x, time, **condition) of it.
        multiple: Of height and width, from its configuration.
        latent: It works on latents even where no autoencoder lies beside it.
        any_size: It takes other sizes than that of its training.
        packed: A position of its input holds so many latents along each axis.
        supports: Values of settings that are understood here; others would be another network than was trained.
    """

    wrap: Callable[[nn.Module], nn.Module]
    multiple: Callable[[Mapping[str, Any]], int]
    latent: bool = True
    any_size: bool = False
    packed: int = 1
    supports: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def channels(self, config: Mapping[str, Any]) -> int:
        return int(config["in_channels"]) // self.packed**2

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuse a network that a prior cannot ask E[x0 | x] of.

        Raises:
            InputError: A setting that is not understood here, or more channels in than out.
        """
        name = config.get("_class_name", "network")
        for setting, known in self.supports.items():
            if config.get(setting) not in known:
                raise InputError(
                    f"a {name} with {setting}={config[setting]!r} cannot be loaded here, only with "
                    f"{' or '.join(map(repr, known))}: its conditions are not known. Wrap it yourself as "
                    "net(x, time, **condition): load_prior(net, predicts=..., schedule=...)"
                )
        into, out = config.get("in_channels"), config.get("out_channels")
        if into is not None and out not in (None, into, 2 * into):
            raise InputError(
                f"this {name} takes in_channels={into} and returns out_channels={out}: it is shown a picture or a "
                "mask beside x, as for inpainting, editing or upscaling, and is no prior of x alone; use the model "
                "that it was made from"
            )


class DiT(nn.Module):
    """A DiTTransformer2DModel; without a label it is asked for its null class, which means any."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self.null = int(net.config["num_embeds_ada_norm"])

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Any:
        any_class = x.new_full((len(x),), self.null).long()
        label = any_class if label is None else check_label(label, self.null + 1, len(x))
        return self.net(x, timestep=time, class_labels=label)


class TextUNet(Conditional):
    """The UNet of Stable Diffusion 1 and 2."""

    def __init__(self, net: Any) -> None:
        super().__init__(net, {"text": ("B", "n", _text_channels(net.config))})

    def call(self, x: Tensor, time: Tensor, *, text: Tensor) -> Any:
        return self.net(x, time, encoder_hidden_states=text)


class SDXL(Sized):
    """The UNet of Stable Diffusion XL: two embeddings of the text, and the sizes of pictures of its training.

    `sizes` are the height and width of the original, top and left of the crop, height and width of the crop; left
    out, those of a picture of the present size that was not cropped.
    """

    def __init__(self, net: Any) -> None:
        config = net.config
        pooled = (
            config["projection_class_embeddings_input_dim"]
            - SIZES * config["addition_time_embed_dim"]
        )
        text = ("B", "n", _text_channels(config))
        super().__init__(net, {"text": text, "pooled": ("B", pooled)}, {"sizes": ("B", SIZES)})

    def call(
        self, x: Tensor, time: Tensor, *, text: Tensor, pooled: Tensor, sizes: Tensor | None = None
    ) -> Any:
        if sizes is None:
            size = self.picture_size(x)
            sizes = torch.cat([size, torch.zeros_like(size), size], dim=1)
        added = {"text_embeds": pooled, "time_ids": sizes}
        return self.net(x, time, encoder_hidden_states=text, added_cond_kwargs=added)


class SD3(Conditional):
    """The transformer of Stable Diffusion 3 and 3.5."""

    def __init__(self, net: Any) -> None:
        super().__init__(net, _joint(net.config))

    def call(self, x: Tensor, time: Tensor, *, text: Tensor, pooled: Tensor) -> Any:
        return self.net(x, timestep=time, encoder_hidden_states=text, pooled_projections=pooled)


class Flux(Conditional):
    """The transformer of FLUX.1: squares of 2 x 2 latents in a row, each with its place; time from 0 to 1.

    `guidance` (B,) is the scale that a network with guidance_embeds was distilled for.
    """

    def __init__(self, net: Any) -> None:
        takes = {"guidance": ("B",)} if net.config["guidance_embeds"] else {}
        super().__init__(net, _joint(net.config), takes)

    def call(
        self,
        x: Tensor,
        time: Tensor,
        *,
        text: Tensor,
        pooled: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        if guidance is None and self.takes:
            guidance = x.new_full((len(x),), DISTILLED_GUIDANCE)
        squares = F.pixel_unshuffle(x, 2)  # (B, 4 c, h, w)
        size = squares.shape[2:]
        rows, columns = (torch.arange(n, device=x.device, dtype=x.dtype) for n in size)
        places = torch.cartesian_prod(x.new_zeros(1), rows, columns)
        output = self.net(
            squares.flatten(2).mT,
            timestep=time / 1000,  # whatever the steps of the scheduler
            guidance=guidance,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            txt_ids=x.new_zeros(text.shape[1], 3),
            img_ids=places,
        )
        return F.pixel_shuffle(output.sample.mT.unflatten(2, size), 2)


class PixArt(Sized):
    """The transformer of PixArt-alpha and PixArt-Sigma.

    `text_mask` is 1 for the tokens of the text, 0 for those that fill it up. `sizes` are the height and width of the
    picture, of a network that is told them; left out, the present ones.
    """

    def __init__(self, net: Any) -> None:
        text = net.config["caption_channels"] or net.config["cross_attention_dim"]
        takes = {"text_mask": ("B", "n")}
        if net.use_additional_conditions:
            takes |= {"sizes": ("B", 2)}
        super().__init__(net, {"text": ("B", "n", text)}, takes)

    def call(
        self,
        x: Tensor,
        time: Tensor,
        *,
        text: Tensor,
        text_mask: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Any:
        size = self.picture_size(x) if sizes is None else sizes
        added = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
        return self.net(
            x,
            timestep=time,
            encoder_hidden_states=text,
            encoder_attention_mask=text_mask,
            added_cond_kwargs=added if "sizes" in self.takes else {},
        )


def unet2d(net: nn.Module) -> WithLabels:
    """Return a diffusers.UNet2DModel as net(x, time, label=...)."""
    embedding = getattr(net, "class_embedding", None)
    return WithLabels(net, int(getattr(embedding, "num_embeddings", 0)))


def conditional_unet(net: Any) -> Conditional:
    """Return a diffusers.UNet2DConditionModel as net(x, time, text=..., ...)."""
    return (SDXL if net.config["addition_embed_type"] else TextUNet)(net)


def _text_channels(config: Mapping[str, Any]) -> int | str:
    if config.get("encoder_hid_dim") is not None:
        return int(config["encoder_hid_dim"])
    width = config["cross_attention_dim"]
    widths = set(width) if isinstance(width, list | tuple) else {width}
    return int(widths.pop()) if len(widths) == 1 else "c"


def _joint(config: Mapping[str, Any]) -> dict[str, tuple[int | str, ...]]:
    text, pooled = config["joint_attention_dim"], config["pooled_projection_dim"]
    return {"text": ("B", "n", text), "pooled": ("B", pooled)}


def _levels(config: Mapping[str, Any]) -> int:
    return 2 ** (len(config["block_out_channels"]) - 1)


def _patch(config: Mapping[str, Any]) -> int:
    return int(config["patch_size"])


NONE = (None,)
KINDS = {
    "UNet2DModel": Kind(unet2d, _levels, latent=False, supports={"class_embed_type": NONE}),
    "UNet2DConditionModel": Kind(
        conditional_unet,
        _levels,
        any_size=True,
        supports={
            "class_embed_type": NONE,
            "num_class_embeds": NONE,
            "addition_embed_type": (None, "text_time"),
            "encoder_hid_dim_type": (None, "text_proj"),
            "time_cond_proj_dim": NONE,  # of consistency models, which do not return E[x0 | x]
        },
    ),
    "DiTTransformer2DModel": Kind(DiT, _patch),
    "SD3Transformer2DModel": Kind(SD3, _patch, any_size=True),
    "FluxTransformer2DModel": Kind(
        Flux, lambda _: 2, any_size=True, packed=2, supports={"patch_size": (None, 1)}
    ),
    "PixArtTransformer2DModel": Kind(PixArt, _patch, any_size=True),
}


def as_network(net: nn.Module) -> nn.Module:
    """Return a network of diffusers as net(x, time, **condition), and any other as it is."""
    for kind in type(net).__mro__:
        if kind.__name__ in KINDS and kind.__module__.startswith("diffusers"):
            known = KINDS[kind.__name__]
            known.check({"_class_name": kind.__name__, **getattr(net, "config", {})})
            return known.wrap(net)
    return net
