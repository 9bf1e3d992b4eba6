"""Evaluate any callable or program over any workers: repeated, timed out, isolated, cached."""

from invguide.blackbox.box import BlackBox
from invguide.blackbox.command import Command, CommandFailed
from invguide.blackbox.ledger import Ledger, Member

__all__ = ["BlackBox", "Command", "CommandFailed", "Ledger", "Member"]
