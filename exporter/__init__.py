"""Rewrites the attention of an ONNX LLM's chosen layers into `trianglemix::TriangleAttention`."""
