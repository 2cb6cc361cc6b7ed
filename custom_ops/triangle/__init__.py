"""The operator `trianglemix::TriangleAttention`: contract, predicate, reference, function body."""
