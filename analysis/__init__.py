"""Which layers of a model may be triangle layers."""

from trianglemix.analysis.select import TriangleMixAnalyzer

__all__ = ["TriangleMixAnalyzer"]
