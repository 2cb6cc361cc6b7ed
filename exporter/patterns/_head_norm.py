"""The RMS norm of each query or key head, as nodes before an attention that did it inside."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from trianglemix.exporter.graph.builder import NodeBuilder


def head_norm(
    build: NodeBuilder, rows: ir.Value, weight: ir.Value, head_size: int, epsilon: float
) -> ir.Value:
    """`x / sqrt(mean(x^2) + epsilon) * weight` of each head of `[B, S, heads*D]`; `weight [D]`.

    The mean is taken in float32, as the CUDA kernel of GroupQueryAttention does.
    """
    heads = build.op("Reshape", rows, build.ints(0, 0, -1, head_size))
    wide = build.cast(heads, ir.DataType.FLOAT)
    square = build.op("Mul", wide, wide)
    if build.opset >= 18:
        mean = build.op("ReduceMean", square, build.ints(-1))
    else:
        mean = build.op("ReduceMean", square, axes=[-1])
    small = build.constant(f"epsilon_{epsilon:g}", np.array(epsilon, np.float32))
    normed = build.op("Div", wide, build.op("Sqrt", build.op("Add", mean, small)))
    scaled = build.op("Mul", build.op("CastLike", normed, weight), weight)
    return build.op("Reshape", scaled, build.ints(0, 0, -1))
