"""Solvers, one algorithm per file."""

if __name__ != "invguide.solvers":
    raise ImportError("import this package as 'invguide.solvers'")

from invguide.solvers.diffpir import DiffPIR
from invguide.solvers.dps import DPS
from invguide.solvers.hqs import HQS
from invguide.solvers.red_diff import REDDiff
from invguide.solvers.unconditional import Unconditional

__all__ = ["DPS", "HQS", "DiffPIR", "REDDiff", "Unconditional"]
