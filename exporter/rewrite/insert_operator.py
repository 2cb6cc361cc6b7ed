"""Turns every attention site into a node of our operators, the cache append folded in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.block_sparse.reference import BlockSparse
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.graph_builder import GraphBuilder, replace_value
from trianglemix.custom_ops.operators import add_function
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN, TrianglePattern
from trianglemix.custom_ops.triangle.reference import Attention
from trianglemix.exporter.attention.head_trace import root_of
from trianglemix.exporter.attention.lengths import (
    Lengths,
    add_prompt_length_input,
    lengths_from_mask,
    lengths_from_node,
    nan_where,
    never_last,
)
from trianglemix.exporter.attention.sites import AttentionSite, Layout, NodeLengths, Operand
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.graph.attention_node import AttentionNode, Rule, append_operator
from trianglemix.exporter.graph.roles import GraphRoles
from trianglemix.exporter.graph.walk import dtype_of, needed_input, producer_of
from trianglemix.exporter.rewrite.cache_form import as_type, cache_in, cache_out

_CACHE_RANK: Final = 4
_SWAP: Final = (0, 2, 1, 3)


class InsertOperatorsPass(ir.passes.InPlacePass):
    """Every site becomes an operator: by its layer's rule, TriangleAttention's dense mode without.

    A site whose source slides a window keeps exactly that window. Afterwards each node has all
    nine inputs and all attributes, the model carries the operators' functions, and past and
    present keep their graph names. What only the old attentions used is dead, but still there.
    """

    def __init__(
        self,
        sites: Sequence[AttentionSite],
        roles: GraphRoles,
        rules: Mapping[int, Rule],
    ) -> None:
        super().__init__()
        self._sites = sites
        self._roles = roles
        self._rules = rules
        self._lengths: dict[NodeLengths | None, Lengths] = {}
        self._never_last: ir.Value | None = None

    @property
    def row_end(self) -> ir.Value:
        """The value `[B]` that says where each row's real tokens end; once the pass has run."""
        return next(iter(self._lengths.values())).row_end

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        prompt_length = add_prompt_length_input(graph)
        build = GraphBuilder(graph, "layers")
        for site in self._sites:
            self._insert(build.at(f"layer.{site.layer}"), site, prompt_length)
        for op_type in sorted({node.node.op_type for node in AttentionNode.all_of(graph)}):
            add_function(model, op_type)
        _sort(graph)
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        nodes = AttentionNode.all_of(model.graph)
        if len(nodes) != len(self._sites):
            raise ir.passes.PostconditionError(f"{len(nodes)} nodes of {len(self._sites)} sites")
        for node in (attention.node for attention in nodes):
            wired = len(node.inputs) == len(contract.INPUTS) and None not in node.inputs
            own = AttentionNode(node).rule.as_attributes()
            if not wired or set(node.attributes) != {*contract.ATTRIBUTES, *own}:
                raise ir.passes.PostconditionError(f"{node.name} is not complete")

    def _insert(self, build: GraphBuilder, site: AttentionSite, prompt_length: ir.Value) -> None:
        lengths = self._lengths_of(site, build, prompt_length)
        node = self._node(build, site, lengths)
        flat = node.outputs[0]
        old_type = site.output.value.type
        flat.type = old_type if site.dtype is None else ir.TensorType(site.dtype)
        flat.shape = None
        if site.lengths is None and site is self._sites[-1]:
            impossible = build.op("Less", lengths.seqlens_k, build.int32(0))
            flat = nan_where(build, impossible, flat)
        flat = as_type(build, flat, dtype_of(site.output.value) if site.dtype else None)
        result = _in_layout(build, flat, site.output, site.shape)
        presents = [
            cache_out(build, present, value, layout, site.dtype)
            for value, present, layout in zip(
                site.present or (), node.outputs[1:], site.cache, strict=False
            )
        ]
        new_nodes = [*site.prologue, *build.nodes]
        old = site.output.value.producer()
        assert old is not None
        build.graph.insert_before(old, new_nodes)
        replace_value(site.output.value, result)
        for value, present in zip(site.present or (), presents, strict=True):
            replace_value(value, present)
        if not any(value.uses() or value.is_graph_output() for value in site.anchor.outputs):
            build.graph.remove(site.anchor, safe=True)

    def _node(self, build: GraphBuilder, site: AttentionSite, lengths: Lengths) -> ir.Node:
        rows = [
            as_type(build, _flat(build, operand), site.dtype)
            for operand in (site.query, site.key, site.value)
        ]
        past = _past(build, site) or _empty_past(build, rows[0], site.shape)
        rule = self._rules.get(site.layer, DENSE_PATTERN)
        prompt_length = lengths.prompt_length
        if site.mask.window is not None:
            rule = TrianglePattern(0, site.mask.window, 1)
            kept = site.lengths.prompt_length if site.lengths else None
            prompt_length = kept or self._no_last_rows(build, lengths)
        return append_operator(
            build,
            [*rows, *past, lengths.seqlens_k, lengths.total_sequence_length, prompt_length,
             lengths.first_valid],
            _attention(site, rule),
        )  # fmt: skip

    def _lengths_of(
        self, site: AttentionSite, builder: GraphBuilder, prompt_length: ir.Value
    ) -> Lengths:
        """Made once for all sites whose lengths come from the same place."""
        key = site.lengths
        place = next(iter(builder.graph)) if key is None else site.anchor
        if key not in self._lengths:
            scope = "lengths" if not self._lengths else f"lengths_{len(self._lengths)}"
            build = builder.at(scope)
            self._lengths[key] = (
                lengths_from_mask(build, self._roles, prompt_length)
                if key is None
                else lengths_from_node(build, key, self._roles, prompt_length)
            )
            build.graph.insert_before(place, build.nodes)
        return self._lengths[key]

    def _no_last_rows(self, builder: GraphBuilder, lengths: Lengths) -> ir.Value:
        """The windowed layers' `prompt_length`, made once."""
        if self._never_last is None:
            producer = lengths.first_valid.producer()
            assert producer is not None
            build = builder.at("lengths/windowed")
            self._never_last = never_last(build, lengths.first_valid)
            build.graph.insert_after(producer, build.nodes)
        return self._never_last


def _attention(site: AttentionSite, rule: Rule) -> Attention | BlockSparse:
    if isinstance(rule, BlockRule):
        return BlockSparse(site.shape, rule, site.scale, site.softcap)
    return Attention(site.shape, rule, site.scale, site.softcap)


def _sort(graph: ir.Graph) -> None:
    try:
        graph.sort()
    except ValueError as error:
        raise RefusedError(
            "an attention's queries depend on its own appended cache, which the operator cannot "
            "give before it has the queries"
        ) from error


def _flat(build: GraphBuilder, operand: Operand) -> ir.Value:
    """The operand as `[B, S, heads*D]`; a transpose just made is taken back, not undone."""
    value = operand.value
    if operand.layout is Layout.FLAT:
        return value
    if operand.layout is Layout.BHDS:
        value = build.transpose(value, 0, 3, 1, 2)
    elif operand.layout is Layout.BHSD:
        transpose = producer_of(value, "Transpose")
        order = () if transpose is None else transpose.attributes.get_ints("perm", ())
        if transpose is not None and tuple(order) == _SWAP:
            value = needed_input(transpose, 0)
        else:
            value = build.transpose(value, *_SWAP)
    return build.reshape(value, 0, 0, -1)


def _in_layout(
    build: GraphBuilder, flat: ir.Value, wanted: Operand, shape: AttentionShape
) -> ir.Value:
    """The operator's output `[B, S, H*Dv]` in the layout of the value that it replaces."""
    if wanted.layout is Layout.FLAT:
        return flat
    apart = build.reshape(flat, 0, 0, shape.num_heads, shape.value_head_size)
    if wanted.layout is Layout.BSHD:
        return apart
    return build.transpose(apart, *_SWAP)


def _past(build: GraphBuilder, site: AttentionSite) -> tuple[ir.Value, ir.Value] | None:
    """Past key and value `[B, G, P, D]` in the operator's type."""
    if site.past is None:
        return None
    key, value = (
        cache_in(build, cache, layout, site.dtype)
        for cache, layout in zip(site.past, site.cache, strict=True)
    )
    if all(len(root_of(cache).shape or ()) == _CACHE_RANK for cache in site.past):
        return key, value
    return _of_batch(build, key, site), _of_batch(build, value, site)


def _of_batch(build: GraphBuilder, past: ir.Value, site: AttentionSite) -> ir.Value:
    """A part of a cache of all layers, its batch that of the queries.

    Before the first call it is empty, and a Concat takes what is empty of any batch.
    """
    batch, size = build.dimension(site.query.value, 0), build.dimension(past, 3)
    return build.reshape(past, batch, site.shape.kv_num_heads, -1, size)


def _empty_past(
    build: GraphBuilder, query: ir.Value, shape: AttentionShape
) -> tuple[ir.Value, ir.Value]:
    """Zero-length past key and value for a source without a cache, in the query's type."""
    batch = build.dimension(query, 0)

    def empty(size: int) -> ir.Value:
        sizes = build.sizes(batch, shape.kv_num_heads, 0, size)
        return build.op("CastLike", build.op("ConstantOfShape", sizes), query)

    return empty(shape.head_size), empty(shape.value_head_size)
