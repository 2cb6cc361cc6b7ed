"""The operator `trianglemix::TriangleAttention`: its contract, reference, function body and kernels."""
