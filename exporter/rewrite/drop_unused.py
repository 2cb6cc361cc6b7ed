"""Takes away what a rewritten graph no longer needs."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.operators import is_ours
from trianglemix.exporter.graph.attention_node import (
    functions_needed,
    functions_of_ours,
)


class DropUnusedPass(ir.passes.InPlacePass):
    """Dead nodes, inputs with a default and the operator's function where nothing uses them.

    An input with a default that a mask read (its window, say) is in the operator's attributes now:
    whoever would give another value must hear that there is no such input any more.
    A folded node cannot use the function: the model then needs the library, and carries none.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        common.RemoveUnusedNodesPass()(model)
        for value in list(graph.inputs):
            if value.name in graph.initializers and not value.uses():
                graph.inputs.remove(value)
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_input() and not value.is_graph_output():
                graph.initializers.pop(name)
        for unused in functions_of_ours(model) - functions_needed(graph):
            model.functions.pop(unused)
        if not any(is_ours(node.domain, node.op_type) for node in graph):
            graph.opset_imports.pop(contract.DOMAIN, None)
        return ir.passes.PassResult(model, True)
