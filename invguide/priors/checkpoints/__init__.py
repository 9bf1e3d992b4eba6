"""Priors from files: whose they are, what is in them, and the network that fits."""
