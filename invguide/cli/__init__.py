"""The command `invguide`."""

from invguide.cli.commands import app, main

__all__ = ["app", "main"]
