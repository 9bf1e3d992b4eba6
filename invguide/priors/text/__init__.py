"""Prompts: text encoders and their tokens."""

from invguide.priors.text.embed import embed_text

__all__ = ["embed_text"]
