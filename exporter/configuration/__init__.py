"""What the files beside a model say of it, and where the graph does otherwise."""
