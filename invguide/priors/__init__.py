"""Priors: closed forms to verify with, and adapters that turn a network into a denoiser."""

from invguide.priors.gaussian import Gaussian
from invguide.priors.mixture import GaussianMixture
from invguide.priors.network import NetworkPrior, from_network

__all__ = ["Gaussian", "GaussianMixture", "NetworkPrior", "from_network"]
