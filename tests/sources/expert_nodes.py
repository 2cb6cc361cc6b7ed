"""`com.microsoft::MoE` in standard operators: ONNX Runtime's CPU provider lacks its gated form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from trianglemix.custom_ops.graph_builder import GraphBuilder


def runnable_here(path: Path, place: Path) -> Path:
    """The model, or a copy in the new folder `place` where its experts are taken apart."""
    model = ir.load(path)
    nodes = [node for node in model.graph if node.op_type == "MoE"]
    if not nodes:
        return path
    for node in nodes:
        _take_apart(model.graph, node)
    place.mkdir()
    ir.save(model, place / "model.onnx", external_data="model.onnx.data")
    return place / "model.onnx"


def _take_apart(graph: ir.Graph, node: ir.Node) -> None:
    """All experts for all tokens, weighed by their gates: right, and slow."""
    assert node.attributes["activation_type"].as_string() == "silu"
    rows, router, gate, gate_bias, down, down_bias, up, *rest = node.inputs
    assert not any(value is not None for value in (gate_bias, down_bias, *rest))
    build = GraphBuilder(graph, f"experts/{node.name}")
    wide = build.op("Unsqueeze", rows, build.ints(0))  # [1, N, hidden]
    gated, raised = (_linear(build, wide, weight) for weight in (gate, up))
    active = build.op("Mul", build.op("Mul", gated, build.op("Sigmoid", gated)), raised)
    results = _linear(build, active, down)  # [experts, N, hidden]
    shares = build.op("Unsqueeze", _shares(build, node, router), build.ints(2))
    total = build.op("ReduceSum", build.op("Mul", results, shares), build.ints(0), keepdims=0)
    graph.insert_before(node, build.nodes)
    node.outputs[0].replace_all_uses_with(total)
    graph.remove(node, safe=True)


def _linear(build: GraphBuilder, rows: ir.Value, weight: ir.Value | None) -> ir.Value:
    """`[experts, N, out]` of `weight [experts, out, in]`."""
    return build.op("MatMul", rows, build.op("Transpose", weight, perm=[0, 2, 1]))


def _shares(build: GraphBuilder, node: ir.Node, router: ir.Value | None) -> ir.Value:
    """`[experts, N]`: each token's weight for each expert, 0 for those not among its best."""
    weights = build.op("Softmax", router, axis=-1)
    count = build.ints(node.attributes.get_int("k", 1))
    best = build.node("TopK", [weights, count], attributes={"axis": -1}, num_outputs=2)
    values, experts = best.outputs
    if node.attributes.get_int("normalize_routing_weights", 0):
        values = build.op("Div", values, build.op("ReduceSum", values, build.ints(-1)))
    none = build.op("Mul", weights, build.constant("no_share", np.array(0, np.float32)))
    shares = build.op("ScatterElements", none, experts, values, axis=1)
    return build.op("Transpose", shares, perm=[1, 0])
