"""What the plug-in refuses: an engine, a model or a version that it would serve wrongly."""

from __future__ import annotations

from trianglemix.custom_ops.errors import TriangleMixError


class ServingError(TriangleMixError):
    """vLLM, as it is set up, cannot serve the configured layers rightly."""
