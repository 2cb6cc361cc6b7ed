"""TriangleMix: O(N) prefill attention for the deep layers of ONNX LLMs."""

from trianglemix.custom_ops.library import library_path

__all__ = ["library_path"]
