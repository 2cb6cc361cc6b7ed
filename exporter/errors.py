"""Errors of the exporter: each says what was wrong, the value, what to do, in one line."""

from __future__ import annotations

from trianglemix.custom_ops.errors import TriangleMixError


class ExportError(TriangleMixError):
    """The export failed: bad input, bad choice, or an output that cannot be written."""


class RefusedError(ExportError):
    """The graph holds something the exporter does not understand; the message names the node."""


class PlanError(ExportError):
    """A layer plan cannot be read, or does not fit the model."""
