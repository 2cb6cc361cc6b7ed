"""What the user gave becomes an ONNX file with its companions."""
