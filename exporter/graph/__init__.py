"""Reading and building onnx-ir graphs, for every stage."""
