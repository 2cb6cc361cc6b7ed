"""The operator `trianglemix::TriangleAttention`: contract, reference, function body, kernels."""
