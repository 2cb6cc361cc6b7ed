"""Base of every error this package raises on purpose."""

from __future__ import annotations

from typing import Final

_LONGEST: Final = 300


class TriangleMixError(Exception):
    """What was wrong, the value, what to do: one line that a command line can print as it is."""


class ConfigurationError(TriangleMixError, ValueError):
    """A parameter is out of its range."""


class WeightsError(TriangleMixError):
    """A Hugging Face folder whose weights are not whole, or not those of its configuration."""


def first_words(error: Exception) -> str:
    """Another package's message in a line: its first, with the next where it only announces it."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [repr(error)]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:_LONGEST]
