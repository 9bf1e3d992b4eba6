"""Priors whose posterior is known: Gaussians, mixtures, Gaussian fields."""
