"""What solvers are made of: step sizes, ascent, zeroth-order slopes, particles, ensembles, linearisation, twists."""
