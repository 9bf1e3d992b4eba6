"""Priors: closed forms to verify with, and adapters that turn a network into a denoiser."""

from invguide.priors.checkpoints.file import read_weights
from invguide.priors.exact.field import FieldPosterior, GaussianField
from invguide.priors.exact.gaussian import Gaussian
from invguide.priors.exact.mixture import GaussianMixture
from invguide.priors.network import NetworkPrior, from_network
from invguide.priors.text.embed import embed_text
from invguide.priors.wrappers.grey import Grey
from invguide.priors.wrappers.latent import LatentPrior
from invguide.priors.wrappers.padding import Padded
from invguide.priors.wrappers.tiled import Tiled

__all__ = [
    "FieldPosterior",
    "Gaussian",
    "GaussianField",
    "GaussianMixture",
    "Grey",
    "LatentPrior",
    "NetworkPrior",
    "Padded",
    "Tiled",
    "embed_text",
    "from_network",
    "read_weights",
]
