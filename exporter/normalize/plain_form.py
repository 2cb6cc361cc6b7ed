"""Passes that take away what only stands in a reader's way: order, names, nodes that do nothing."""

from __future__ import annotations

from itertools import count

import onnx_ir as ir
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.graph.walk import dtype_of, is_op, optional_input, small_constant


class SortNodesPass(ir.passes.InPlacePass):
    """Every node comes after those that make its inputs, in branches and functions too.

    ONNX Runtime opens files whose nodes are in any order, and some converters write them so.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Raises RefusedError for nodes that wait for each other."""
        parts: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
        for part in parts:
            try:
                part.sort()
            except ValueError as error:
                raise RefusedError(
                    f"nodes of {part.name or 'the graph'} wait for each other's results (a cycle), "
                    "so the graph is not valid ONNX; export the model again"
                ) from error
        return ir.passes.PassResult(model, True)


class RemoveIdlePass(ir.passes.InPlacePass):
    """Identities, Casts to the type that is there already, and Dropouts at inference go away.

    One that makes a graph output hands its name on, unless what it reads is a graph input, an
    initializer or a graph output itself: then it stays.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        idle = [node for node in model.graph if _is_idle(node)]
        removed = [node for node in idle if _remove(model.graph, node)]
        return ir.passes.PassResult(model, bool(removed))


def _is_idle(node: ir.Node) -> bool:
    source = optional_input(node, 0)
    if source is None or any(extra.uses() for extra in node.outputs[1:]):
        return False
    if is_op(node, "Dropout"):
        mode = optional_input(node, 2)
        training = small_constant(mode, limit=1)
        return mode is None or (training is not None and not bool(training.reshape(())))
    if is_op(node, "Cast"):
        wanted = node.attributes.get_int("to", 0)
        return dtype_of(source) == ir.DataType(wanted)
    return is_op(node, "Identity")


def _remove(graph: ir.Graph, node: ir.Node) -> bool:
    source, made = node.inputs[0], node.outputs[0]
    assert source is not None
    if any(extra.is_graph_output() for extra in node.outputs[1:]):
        return False
    if made.is_graph_output():
        if source.is_graph_input() or source.is_initializer() or source.is_graph_output():
            return False
        name, kind, shape = made.name, made.type, made.shape
        made.replace_all_uses_with(source, replace_graph_outputs=True)
        made.name = None
        source.name, source.type, source.shape = name, kind, shape or source.shape
    else:
        made.replace_all_uses_with(source)
    graph.remove(node, safe=True)
    return True


class RemoveEmptyConcatPass(ir.passes.InPlacePass):
    """A Concat of one thing becomes that thing: how a traced cache that starts empty looks.

    Afterwards no Concat of the graph has an empty constant among its inputs, or a single input
    (but for one that makes a graph output).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if not is_op(node, "Concat"):
                continue
            kept = [x for x in node.inputs if x is not None and not _is_empty(x)]
            if len(kept) == 1 and not node.outputs[0].is_graph_output():
                node.outputs[0].replace_all_uses_with(kept[0])
                model.graph.remove(node, safe=True)
                modified = True
            elif 0 < len(kept) < len(node.inputs):
                self._shorten(node, kept)
                modified = True
        return ir.passes.PassResult(model, modified)

    @staticmethod
    def _shorten(node: ir.Node, kept: list[ir.Value]) -> None:
        node.resize_inputs(len(kept))
        for index, value in enumerate(kept):
            node.replace_input_with(index, value)


class RenameTwinNodesPass(ir.passes.InPlacePass):
    """A node whose name another has before it gets a number: ONNX Runtime refuses such a file."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        taken = {node.name for node in model.graph}
        seen: set[str | None] = {None, ""}
        modified = False
        for node in model.graph:
            if node.name in seen and node.name:
                names = (f"{node.name}_{number}" for number in count(1))
                node.name = next(name for name in names if name not in taken)
                taken.add(node.name)
                modified = True
            seen.add(node.name)
        return ir.passes.PassResult(model, modified)


def _is_empty(value: ir.Value | None) -> bool:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return tensor is not None and tensor.size == 0
