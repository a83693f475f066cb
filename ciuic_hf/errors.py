"""The exception that every bad input ends in: one sentence with what was given, what was expected, how to fix it."""

from __future__ import annotations


class CiuicError(ValueError):
    """A configuration, checkpoint or tensor that Ciuic cannot use. The message says what to do."""
