"""Priors made of priors: tiles, padding, latents, grey pictures."""
