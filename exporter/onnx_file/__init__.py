"""ONNX files and their weights: loading, checking, saving."""
