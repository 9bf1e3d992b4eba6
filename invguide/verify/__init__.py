"""How far a solver's samples are from the exact posterior, on problems where that is known."""

from invguide.verify.black_box import (
    BlackBoxTarget,
    Hidden,
    HiddenPosterior,
    TiltedPlane,
    black_box_targets,
    three_blobs,
)
from invguide.verify.black_box_table import BlackBoxRow, is_black_box, verify_black_box
from invguide.verify.conformance import conformance
from invguide.verify.distances import mean_error, sliced_wasserstein, std_ratio, unweighted
from invguide.verify.table import Row, Table, verify
from invguide.verify.targets import (
    MatrixOperator,
    Target,
    gaussian_2d,
    gaussian_64d,
    mixture_1d,
    mixture_25,
    standard_targets,
)

__all__ = [
    "BlackBoxRow",
    "BlackBoxTarget",
    "Hidden",
    "HiddenPosterior",
    "MatrixOperator",
    "Row",
    "Table",
    "Target",
    "TiltedPlane",
    "black_box_targets",
    "conformance",
    "gaussian_2d",
    "gaussian_64d",
    "is_black_box",
    "mean_error",
    "mixture_1d",
    "mixture_25",
    "sliced_wasserstein",
    "standard_targets",
    "std_ratio",
    "three_blobs",
    "unweighted",
    "verify",
    "verify_black_box",
]
