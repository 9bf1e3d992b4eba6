"""The command `invguide`."""

from invguide.cli.commands import main
from invguide.cli.terminal import app

__all__ = ["app", "main"]
