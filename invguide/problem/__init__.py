"""A measurement, or a reward, or both, with the prior: what solvers see."""

from invguide.problem.problem import Counters, Problem, TargetGradient
from invguide.problem.whitened_map import WhitenedLinear
from invguide.renamed import old_names

__all__ = ["Counters", "Problem", "TargetGradient", "WhitenedLinear"]

__getattr__ = old_names(__name__)
