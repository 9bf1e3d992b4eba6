"""Solvers, one algorithm per file."""

if __name__ != "invguide.solvers":
    raise ImportError("import this package as 'invguide.solvers'")

from invguide.solvers.anscombe import Anscombe
from invguide.solvers.dflow import DFlow
from invguide.solvers.diffpir import DiffPIR
from invguide.solvers.doodl import DOODL
from invguide.solvers.dpg import DPG
from invguide.solvers.dps import DPS
from invguide.solvers.dps_zeroth_order import DPSZerothOrder
from invguide.solvers.dreamguider import Dreamguider
from invguide.solvers.ecm_guidance import ECMGuidance
from invguide.solvers.eki import EKI
from invguide.solvers.elucd import EluCD
from invguide.solvers.enkg import EnKG
from invguide.solvers.ensemble_twisted import EnsembleTwisted
from invguide.solvers.exact_posterior import ExactPosterior
from invguide.solvers.feature_guidance import FeatureGuidance
from invguide.solvers.feynman_kac import FeynmanKac
from invguide.solvers.hqs import HQS
from invguide.solvers.motion_guidance import MotionGuidance
from invguide.solvers.posterior_mean import PosteriorMean
from invguide.solvers.red_diff import REDDiff
from invguide.solvers.scg import SCG
from invguide.solvers.symplectic_adjoint import SymplecticAdjoint
from invguide.solvers.tweedie_matheron import TweedieMatheron
from invguide.solvers.unconditional import Unconditional
from invguide.solvers.universal_guidance import UniversalGuidance

__all__ = [
    "DOODL",
    "DPG",
    "DPS",
    "EKI",
    "HQS",
    "SCG",
    "Anscombe",
    "DFlow",
    "DPSZerothOrder",
    "DiffPIR",
    "Dreamguider",
    "ECMGuidance",
    "EluCD",
    "EnKG",
    "EnsembleTwisted",
    "ExactPosterior",
    "FeatureGuidance",
    "FeynmanKac",
    "MotionGuidance",
    "PosteriorMean",
    "REDDiff",
    "SymplecticAdjoint",
    "TweedieMatheron",
    "Unconditional",
    "UniversalGuidance",
]
