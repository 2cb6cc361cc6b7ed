"""Hugging Face folders become ONNX files, through torch."""
