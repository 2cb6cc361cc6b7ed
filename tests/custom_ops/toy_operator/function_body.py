"""What the toy means in standard operators."""

import onnx_ir as ir


def build_function() -> ir.Function:
    x, factor = ir.Value(name="x"), ir.Value(name="factor")
    cast = ir.node("CastLike", [factor, x])
    product = ir.node("Mul", [x, cast.outputs[0]])
    product.outputs[0].name = "output"
    graph = ir.Graph(
        [x, factor], product.outputs, nodes=[cast, product], opset_imports={"": 17}, name="toy"
    )
    return ir.Function("trianglemix", "ToyOperator", graph=graph, attributes=[])
