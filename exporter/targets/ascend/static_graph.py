"""Turns the canonical graph of TriangleAttention nodes into one static graph over a cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.custom_ops.triangle.reference import Attention
from trianglemix.exporter.attention.lengths import PROMPT_LENGTH
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.graph.attention_node import AttentionNode
from trianglemix.exporter.graph.roles import FLOATS, GraphRoles, find_roles
from trianglemix.exporter.graph.walk import is_op
from trianglemix.exporter.interface.language_model_head import find_head
from trianglemix.exporter.rewrite.shared_cache import FreeCacheLengthPass
from trianglemix.exporter.targets.ascend import static_plan
from trianglemix.exporter.targets.ascend.block_form import BlockForm, StaticInputs, StaticOutputs
from trianglemix.exporter.targets.ascend.custom_form import CustomForm
from trianglemix.exporter.targets.ascend.custom_operator import INPUTS
from trianglemix.exporter.targets.ascend.position_ranges import find_position_ranges
from trianglemix.exporter.targets.ascend.row_cut import before_row_cut
from trianglemix.exporter.targets.ascend.static_plan import GraphKind, StaticPlan
from trianglemix.manifest.manifest import LayerCache
from trianglemix.manifest.static_graphs import Lowering

_INT32, _INT64 = ir.DataType.INT32, ir.DataType.INT64
_LOGITS_TO_KEEP: Final = ("num_logits_to_keep", "logits_to_keep")
AttentionForm = BlockForm | CustomForm
_FORMS: Final[dict[Lowering, type[AttentionForm]]] = {"block": BlockForm, "custom": CustomForm}


@dataclass(frozen=True)
class LayerGeometry:
    """What one TriangleAttention node of the canonical graph says, and its type."""

    attention: Attention
    dtype: ir.DataType
    owner: int  # the layer whose cache it reads: itself, or an earlier one that shares its keys
    is_sliding: bool  # the source model's own window: in the tail and in decoding too

    @property
    def is_banded(self) -> bool:
        """Whether stream rows drop keys."""
        return not self.attention.pattern.is_dense

    def cache_shapes(self, layer: int, slots: int) -> dict[str, tuple[int, ...]]:
        """Shapes of keys and values of the layer's cache, by the names of their inputs."""
        shape = self.attention.shape
        key, value = static_plan.cache_names(layer)
        return {
            key: (1, shape.kv_num_heads, slots, shape.head_size),
            value: (1, shape.kv_num_heads, slots, shape.value_head_size),
        }


def read_layers(model: ir.Model, caches: Sequence[LayerCache]) -> list[LayerGeometry]:
    """The attentions of a canonical graph, layer 0 first.

    Head sizes that the graph has only as symbols are filled in from `caches`, where they were
    measured.

    Raises:
        RefusedError: the source has no KV cache, so that head sizes and types are not known.
    """
    sizes = {cache.past_key: cache.head_size for cache in caches}
    sizes |= {cache.past_value: cache.value_head_size for cache in caches}
    for value in model.graph.inputs:
        if value.name in sizes and value.shape is not None:
            value.shape = ir.Shape([*list(value.shape)[:3], sizes[value.name]])
    nodes = AttentionNode.all_of(model.graph)
    owners = _owners(nodes)
    return [_geometry(node, owner) for node, owner in zip(nodes, owners, strict=True)]


class MakeStaticPass(ir.passes.InPlacePass):
    """Afterwards the graph takes `input_ids [1, S]`, `start [1]`, the cache (a tail also
    `length [1]`) and gives new keys and values, and logits `[1, 1, vocabulary]` but for a stream.

    Positions count from `start`. What served the source's own cache and masks is gone.

    Raises:
        RefusedError: something else than attention reads the mask or the cache's length.
    """

    def __init__(self, kind: GraphKind, plan: StaticPlan) -> None:
        super().__init__()
        self._kind, self._plan = kind, plan
        self._call = plan.call(kind)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, roles = model.graph, find_roles(model.graph)
        FreeCacheLengthPass(roles)(model)  # the length of a past, wherever read, is the mask's now
        _read_batch_from_ids(roles)
        start = ir.val(static_plan.START, dtype=_INT32, shape=(1,))
        head = GraphBuilder(graph, "static/positions")
        self._replace_lengths(head, start)
        positions = self._positions(head, start)
        _keep_all_logits(head)
        if roles.position_ids is not None:
            roles.position_ids.replace_all_uses_with(positions)
        for counted, dtype in list(find_position_ranges(graph, roles)):
            row = head.cast(head.reshape(positions, self._call.rows), ir.DataType.from_numpy(dtype))
            counted.replace_all_uses_with(row)
        inputs, new_rows = self._replace_attentions(head.at("static/attention"), start)
        length = ir.val(static_plan.LENGTH, dtype=_INT32, shape=(1,))
        logits = self._logits(head.at("static/last_row"), roles, length)
        graph.insert_before(next(iter(graph)), head.nodes)
        roles.input_ids.name = static_plan.INPUT_IDS
        old_inputs = list(graph.inputs)
        graph.outputs[:] = [*logits, *new_rows]
        lengths = [length] if self._kind is GraphKind.TAIL else []
        graph.inputs[:] = [roles.input_ids, start, *lengths, *inputs]
        graph.initializers.pop(PROMPT_LENGTH, None)  # it was the default of an optional input
        model.functions.clear()
        if self._plan.lowering == "block":
            graph.opset_imports.pop(contract.DOMAIN, None)
        common.RemoveUnusedNodesPass()(model)
        _check_free((x for x in old_inputs if x is not roles.input_ids), roles)
        graph.inputs[:] = [value for value in graph.inputs if value.uses()]
        graph.sort()
        return ir.passes.PassResult(model, True)

    def input_sizes(self, layers: list[LayerGeometry]) -> dict[str, tuple[int, ...]]:
        """Sizes of every input that this graph may have."""
        sizes: dict[str, tuple[int, ...]] = {
            static_plan.INPUT_IDS: (1, self._call.rows),
            static_plan.START: (1,),
            static_plan.LENGTH: (1,),
        }
        for layer, geometry in enumerate(layers):
            sizes |= geometry.cache_shapes(layer, self._call.slots)
        return sizes

    def _replace_lengths(self, build: GraphBuilder, start: ir.Value) -> None:
        """Whatever counts positions from the operator's lengths counts from `start` now."""
        rows = self._call.rows
        end = build.op("Add", start, build.int32([rows]))
        for node in AttentionNode.all_of(build.graph):
            seqlens, total = node.seqlens_k, node.total_sequence_length
            if seqlens.producer() not in build.nodes:
                _lengths_are_possible(seqlens, build)
                seqlens.replace_all_uses_with(build.op("Sub", end, build.int32([1])))
            if total.producer() not in build.nodes:
                total.replace_all_uses_with(end)

    def _positions(self, build: GraphBuilder, start: ir.Value) -> ir.Value:
        """`[1, S]` int64; pads that would lie behind the cache stay on its last slot."""
        rows = build.int32(np.arange(self._call.rows).reshape(1, -1))
        position = build.op("Min", build.op("Add", rows, start), build.int32(self._plan.slots - 1))
        return build.cast(position, _INT64)

    def _replace_attentions(
        self, build: GraphBuilder, start: ir.Value
    ) -> tuple[list[ir.Value], list[ir.Value]]:
        """The cache inputs and the outputs of new rows, in the order of the layers."""
        nodes = AttentionNode.all_of(build.graph)
        owners = _owners(nodes)
        forms: dict[ir.DataType, AttentionForm] = {}
        pasts: list[tuple[ir.Value, ir.Value]] = []
        inputs: list[ir.Value] = []
        outputs: list[ir.Value] = []
        for layer, node in enumerate(nodes):
            geometry = _geometry(node, owners[layer])
            if geometry.dtype not in forms:
                form = _FORMS[self._plan.lowering]
                forms[geometry.dtype] = form(build, start, self._call, geometry.dtype)
            shares = geometry.owner != layer
            past = (
                pasts[geometry.owner]
                if shares
                else _cache_values(layer, geometry, self._call.slots)
            )
            pasts.append(past)
            for old, new in zip(node.past, past, strict=True):
                old.replace_all_uses_with(new)  # others read its other sizes
            done = len(build.nodes)
            made = self._attend(forms[geometry.dtype], node, geometry, past)
            build.graph.insert_before(node.node, build.nodes[done:])
            output = node.node.outputs[0]
            made.output.type = made.output.type or output.type
            output.replace_all_uses_with(made.output)
            inputs += [] if shares else past
            outputs += [] if shares else _named(layer, geometry, made)
        return inputs, outputs

    def _attend(
        self,
        form: AttentionForm,
        node: AttentionNode,
        geometry: LayerGeometry,
        past: tuple[ir.Value, ir.Value],
    ) -> StaticOutputs:
        assert node.key is not None  # the canonical form is not packed
        assert node.value is not None
        rows = StaticInputs(node.query, node.key, node.value, *past)
        stream = self._kind is GraphKind.STREAM
        if geometry.is_banded and (stream or geometry.is_sliding):
            return form.banded(rows, geometry.attention)
        return form.dense(rows, geometry.attention)

    def _logits(self, build: GraphBuilder, roles: GraphRoles, length: ir.Value) -> list[ir.Value]:
        """None for a stream; a tail's are those of row `length - 1` only."""
        if self._kind is GraphKind.STREAM:
            return []
        logits = roles.logits
        if self._kind is GraphKind.TAIL:
            logits = _keep_row(build, roles, length)
        logits.name = static_plan.LOGITS
        return [logits]


def _read_batch_from_ids(roles: GraphRoles) -> None:
    """The batch size is the token ids' too: where only that is read of the mask, read it there."""
    for node in list(roles.attention_mask.consumers()):
        span = node.attributes.get_int("start", 0), node.attributes.get_int("end", -1)
        if is_op(node, "Shape") and span == (0, 1):
            node.replace_input_with(0, roles.input_ids)


def _keep_row(build: GraphBuilder, roles: GraphRoles, length: ir.Value) -> ir.Value:
    """Logits of row `length - 1`, picked before the head where the head is known."""
    row = build.op("Sub", length, build.int32([1]))
    head = find_head(roles)
    logits = roles.logits
    if head is None or not is_op(head.node, "MatMul"):
        picked = build.op("Gather", logits, row, axis=1)
        producer = logits.producer()
        assert producer is not None
        build.graph.insert_after(producer, build.nodes)
        logits.name, logits = "logits/all", picked
    else:
        picked = build.op("Gather", before_row_cut(head.hidden), row, axis=1)
        build.graph.insert_before(head.node, build.nodes)
        head.node.replace_input_with(0, picked)
    return logits


def _lengths_are_possible(seqlens: ir.Value, build: GraphBuilder) -> None:
    """The guard `seqlens_k < 0` against masks with holes: here are no masks, so it is false."""
    for node in list(seqlens.consumers()):
        if is_op(node, "Less") and node.inputs[0] is seqlens:
            node.outputs[0].replace_all_uses_with(build.constant("false", np.zeros(1, np.bool_)))


def _owners(nodes: Sequence[AttentionNode]) -> list[int]:
    """For each attention the first one that reads the same past."""
    first: dict[ir.Value | None, int] = {}
    return [first.setdefault(x.past[0], layer) for layer, x in enumerate(nodes)]


def _geometry(triangle: AttentionNode, owner: int) -> LayerGeometry:
    node = triangle.node
    more = [value for value in node.inputs[len(INPUTS) :] if value is not None]
    if more:
        raise RefusedError(
            f"node {node.name} has inputs beyond {INPUTS[-1]} ({more[0].name}), which static "
            "graphs do not spell out; export the model that it was made from"
        )
    past = triangle.past
    sizes = [value.shape[3] if value.shape is not None else None for value in past]
    dtype = past[0].dtype
    if dtype is None or not all(isinstance(size, int) for size in sizes):
        raise RefusedError(
            f"node {node.name} has a past of unknown type or head size; export the model with a "
            "KV cache (past and present as inputs and outputs)"
        )
    shape = AttentionShape(
        triangle.num_heads,
        triangle.kv_num_heads,
        *(int(size) for size in sizes),  # type: ignore[arg-type]
    )
    attention = Attention(shape, triangle.pattern, triangle.scale, triangle.softcap)
    return LayerGeometry(attention, dtype, owner, triangle.never_last)


def _cache_values(layer: int, geometry: LayerGeometry, slots: int) -> tuple[ir.Value, ir.Value]:
    shapes = geometry.cache_shapes(layer, slots).items()
    key, value = (ir.val(name, dtype=geometry.dtype, shape=shape) for name, shape in shapes)
    return key, value


def _named(layer: int, geometry: LayerGeometry, made: StaticOutputs) -> list[ir.Value]:
    outputs = [made.new_key, made.new_value]
    for name, value in zip(static_plan.new_names(layer), outputs, strict=True):
        value.name = name
        value.type = ir.TensorType(geometry.dtype)
    return outputs


def _keep_all_logits(build: GraphBuilder) -> None:
    """A choice of how many logits to keep is 0, all of them: the tail picks its row itself."""
    for value in build.graph.inputs:
        if value.name in _LOGITS_TO_KEEP and value.dtype is not None:
            sizes = [size if isinstance(size, int) else 1 for size in value.shape or ()]
            all_of_them = build.constant("all_logits", np.zeros(sizes, value.dtype.numpy()))
            value.replace_all_uses_with(all_of_them)


def _check_free(values: Iterable[ir.Value], roles: GraphRoles) -> None:
    for value in values:
        consumers = list(value.consumers())
        if consumers:
            node = consumers[0]
            raise RefusedError(
                f"node {node.name} ({node.op_type}) reads {value.name} outside of attention; a "
                f"static graph over one cache cannot give it that: {_advice(value, roles)}"
            )


def _advice(value: ir.Value, roles: GraphRoles) -> str:
    """Why, and what to do about it."""
    axes = 0 if value.shape is None else len(value.shape)
    if value is roles.attention_mask or value in roles.caches:
        if roles.position_ids is None:
            return "export the model with the input position_ids, so that nothing counts from it"
        return "it knows positions, not masks; use --target cpu or cuda"
    if "position" in (value.name or ""):
        return (
            f"positions with {axes} axes (sections for images and text) are not the tokens' "
            "numbers; use --target cpu or cuda, or export the text model alone"
        )
    if value.dtype in FLOATS and axes > 1:
        return (
            "it is a state besides keys and values (of a convolution or a recurrent layer), and "
            "static graphs carry none; use --target cpu or cuda"
        )
    return "nothing says what it means; use --target cpu or cuda, or export without that input"
