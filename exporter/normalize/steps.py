"""Brings a loaded graph into the plain form that the patterns read; its meaning stays."""

from __future__ import annotations

from typing import Final

import onnx
import onnx_ir as ir
from onnx_ir.passes import common
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.operators import is_ours
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.normalize.fuse_softmax import FuseSoftmaxPass
from trianglemix.exporter.normalize.infer_shapes import InferShapesPass
from trianglemix.exporter.normalize.plain_form import (
    RemoveEmptyConcatPass,
    RemoveIdlePass,
    RenameTwinNodesPass,
    SortNodesPass,
)
from trianglemix.exporter.normalize.raise_opset import OLDEST_OPSET, RaiseOpsetPass, raised_note
from trianglemix.exporter.normalize.unfuse_products import UnfuseEinsumPass, UnfuseMatMulPass

_PRODUCTS: Final = frozenset(
    {"MatMul", "Gemm", "MatMulNBits", "Softmax", "Attention", "MultiHeadAttention",
     "GroupQueryAttention"}
)  # fmt: skip


def normalize(model: ir.Model) -> list[str]:
    """Sorted nodes, constants as initializers, fused products and functions (not our own) apart.

    What does nothing is gone, sizes that can be inferred are stated, an old opset is raised to the
    one that the operator's function needs. Returns notes for the report.

    Raises:
        RefusedError: an opset too old to be raised, a node without an input that its operator
            needs, attention inside a branch, or nodes that wait for each other.
    """
    check_versions(model)
    before = model.graph.opset_imports[""]
    check_inputs(model.graph)
    check_no_branches(model.graph)
    passes: list[ir.passes.PassBase] = [
        common.ClearMetadataAndDocStringPass(),
        SortNodesPass(),
        common.InlinePass(lambda function: not is_ours(function.domain, function.name)),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        RemoveEmptyConcatPass(),
        InferShapesPass(),
        RaiseOpsetPass(),
        RemoveIdlePass(),
        UnfuseMatMulPass(),
        UnfuseEinsumPass(),
        FuseSoftmaxPass(),
        common.RemoveUnusedNodesPass(),
        RenameTwinNodesPass(),
    ]
    for step in passes:
        step(model)
    return [] if model.graph.opset_imports[""] == before else [raised_note(before)]


def check_versions(model: ir.Model) -> None:
    """Raises RefusedError for a model of an opset that cannot be raised."""
    opset = model.graph.opset_imports.get("")
    if opset is None or opset < OLDEST_OPSET:
        raise RefusedError(
            f"the model's opset is {opset}, but the operator needs {contract.FUNCTION_OPSET}, and "
            f"only models of {OLDEST_OPSET} or later can be raised to it; export the model again "
            "with a newer opset (18 fits every runtime)"
        )


def check_inputs(graph: ir.Graph) -> None:
    """Raises RefusedError for a standard operator that lacks an input: patterns rely on them."""
    opset = graph.opset_imports[""]
    for node in graph:
        if node.domain not in ("", "ai.onnx"):
            continue
        try:
            schema = onnx.defs.get_schema(node.op_type, opset, "")
        except onnx.defs.SchemaError:
            continue  # some runtimes' own operators stand in the standard domain
        for index, wanted in enumerate(schema.inputs):
            given = node.inputs[index] if index < len(node.inputs) else None
            if given is None and wanted.option == onnx.defs.OpSchema.FormalParameterOption.Single:
                raise RefusedError(
                    f"node {node.name} ({node.op_type}) lacks its input {wanted.name}: the graph "
                    "is not valid ONNX; export the model again"
                )


def check_no_branches(graph: ir.Graph) -> None:
    """Raises RefusedError where attention stands inside an If, Loop or Scan: no pattern looks."""
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type is ir.AttributeType.GRAPH and _holds_product(attribute.as_graph()):
                raise RefusedError(
                    f"node {node.name} ({node.op_type}) holds a part of the model in its branch "
                    f"{attribute.name}, as a merged decoder does; export the decoder with its "
                    "cache as one graph (optimum: --no-post-process, then decoder_with_past)"
                )


def _holds_product(graph: ir.Graph) -> bool:
    """Whether weights or attention are at work in it: branches without stay as they are."""
    return any(node.op_type in _PRODUCTS for node in graph.all_nodes())
