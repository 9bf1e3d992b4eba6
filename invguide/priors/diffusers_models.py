"""Networks of diffusers as net(x, time, **condition): one name for each condition, whatever the class calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from invguide.errors import InputError
from invguide.priors.labels import WithLabels, check_label


@dataclass(frozen=True)
class Kind:
    """A class of diffusers.

    Attributes:
        wrap: Makes net(x, time, **condition) of it.
        multiple: Of height and width, from its configuration.
        latent: It works on the latents of an autoencoder.
        any_size: It takes other sizes than that of its training.
    """

    wrap: Callable[[nn.Module], nn.Module]
    multiple: Callable[[Mapping[str, Any]], int]
    latent: bool = True
    any_size: bool = False


class WithConditions(nn.Module):
    """A network that needs every one of its conditions, such as the embedding of a text.

    Args:
        net: The network.
        image: What it calls its input.
        names: What it calls each condition, by the name that is passed here.
    """

    def __init__(self, net: nn.Module, image: str, names: Mapping[str, str]) -> None:
        super().__init__()
        self.net, self.image, self.names = net, image, dict(names)

    def forward(self, x: Tensor, time: Tensor, **condition: Tensor) -> Any:
        if condition.keys() != self.names.keys():
            raise InputError(
                f"{type(self.net).__name__} is conditional on {', '.join(self.names)} (embeddings, one row per "
                f"sample), and got {', '.join(condition) or 'nothing'}: pass condition={{'text': ...}} to solve, "
                "or text=... to denoise"
            )
        renamed = {self.names[name]: value.to(x.dtype) for name, value in condition.items()}
        return self.net(**{self.image: x}, timestep=time, **renamed)


class DiT(nn.Module):
    """A DiTTransformer2DModel; without a label it is asked for its null class, which means any."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.null = int(net.config["num_embeds_ada_norm"])  # pyright: ignore[reportIndexIssue, reportArgumentType]

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Any:
        any_class = x.new_full((len(x),), self.null).long()
        label = any_class if label is None else check_label(label, self.null + 1, len(x))
        return self.net(x, timestep=time, class_labels=label)


def unet2d(net: nn.Module) -> WithLabels:
    """Return a diffusers.UNet2DModel as net(x, time, label=...)."""
    embedding = getattr(net, "class_embedding", None)
    return WithLabels(net, int(getattr(embedding, "num_embeddings", 0)))


def _text_unet(net: nn.Module) -> nn.Module:
    return WithConditions(net, "sample", {"text": "encoder_hidden_states"})


def _text_transformer(net: nn.Module) -> nn.Module:
    names = {"text": "encoder_hidden_states", "pooled": "pooled_projections"}
    return WithConditions(net, "hidden_states", names)


def _levels(config: Mapping[str, Any]) -> int:
    return 2 ** (len(config["block_out_channels"]) - 1)


def _patch(config: Mapping[str, Any]) -> int:
    return int(config["patch_size"])


KINDS = {
    "UNet2DModel": Kind(unet2d, _levels, latent=False),
    "UNet2DConditionModel": Kind(_text_unet, _levels, any_size=True),
    "DiTTransformer2DModel": Kind(DiT, _patch),
    "SD3Transformer2DModel": Kind(_text_transformer, _patch, any_size=True),
}


def as_network(net: nn.Module) -> nn.Module:
    """Return a network of diffusers as net(x, time, **condition), and any other as it is."""
    for kind in type(net).__mro__:
        if kind.__name__ in KINDS and kind.__module__.startswith("diffusers"):
            return KINDS[kind.__name__].wrap(net)
    return net
