"""A measurement, or a reward, or both, with the prior: what solvers see."""

from invguide.problem.problem import Counters, Guidance, Problem, WhitenedLinear

__all__ = ["Counters", "Guidance", "Problem", "WhitenedLinear"]
