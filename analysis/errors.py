"""Errors of the analysis: what was wrong, the value, what to do."""

from trianglemix.custom_ops.errors import TriangleMixError


class AnalysisError(TriangleMixError):
    """The model or the data cannot be analysed, or an analysis cannot be continued."""
