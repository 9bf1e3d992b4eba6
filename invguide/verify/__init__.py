"""How far a solver's samples are from the exact posterior, on problems where that is known."""

from invguide.verify.distances import mean_error, sliced_wasserstein, std_ratio
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
    "MatrixOperator",
    "Row",
    "Table",
    "Target",
    "gaussian_2d",
    "gaussian_64d",
    "mean_error",
    "mixture_1d",
    "mixture_25",
    "sliced_wasserstein",
    "standard_targets",
    "std_ratio",
    "verify",
]
