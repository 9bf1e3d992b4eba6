"""Algebra and analysis that know nothing of problems: optimisation, symmetries, extensions, Runge-Kutta tableaus."""
