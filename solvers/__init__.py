"""Solvers, one algorithm per file."""

if __name__ != "invguide.solvers":
    raise ImportError("import this package as 'invguide.solvers'")
