"""Priors: closed forms to verify with, and adapters that turn a network into a denoiser."""

from invguide.priors.checkpoint_file import read_weights
from invguide.priors.field import FieldPosterior, GaussianField
from invguide.priors.gaussian import Gaussian
from invguide.priors.grey import Grey
from invguide.priors.latent import LatentPrior
from invguide.priors.mixture import GaussianMixture
from invguide.priors.network import NetworkPrior, from_network
from invguide.priors.padding import Padded
from invguide.priors.text import embed_text
from invguide.priors.tiled import Tiled

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
