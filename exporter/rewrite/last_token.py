"""Last-token logits: the LM head sees one row per sequence instead of the whole prompt."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.graph.attention_node import AttentionNode
from trianglemix.exporter.graph.roles import GraphRoles, rank
from trianglemix.exporter.graph.walk import is_constant, is_op, needed_input, small_constant
from trianglemix.exporter.interface.language_model_head import LanguageModelHead, find_head
from trianglemix.exporter.rewrite.decoder_tail import find_tail

_LOGITS_RANK: Final = 3


class KeepLastLogitsPass(ir.passes.InPlacePass):
    """The head sees each row's last real token of the call (right padding left aside) only.

    So does everything behind the last attention, where the graph is plain enough to be certain.
    Afterwards the logits are `[B, 1, vocabulary]`, and `tail_sizes` is the sum of the sizes of the
    weights that see one row besides the head's.
    """

    def __init__(self, roles: GraphRoles, row_end: ir.Value) -> None:
        super().__init__()
        self._roles = roles
        self._row_end = row_end
        self.tail_sizes = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        logits = self._roles.logits
        if logits.shape is not None and len(logits.shape) != _LOGITS_RANK:
            raise RefusedError(
                f"the logits {logits.shape} are not [batch, length, vocabulary], so that no row of "
                "them can be chosen; leave --last-token-logits out"
            )
        if logits.shape is not None and logits.shape[1] == 1:
            return ir.passes.PassResult(model, False)
        head = find_head(self._roles)
        if head is None or is_op(head.node, "Gemm") or not self._keeps_rows_apart(head):
            raise RefusedError(
                "no product of hidden states [B, S, hidden] with a weight was found behind the "
                "logits; leave --last-token-logits out"
            )
        tail = find_tail(head.hidden)
        build = GraphBuilder(model.graph, "last_token")
        index = build.unsqueeze(self._row_index(model, build, tail.entries[0]), 1, 2)
        readers = tail.nodes or {head.node}
        for value in tail.entries:
            last = build.op("GatherND", value, index, batch_dims=1)  # [B, 1, width]
            last.type = value.type
            for node, position in list(value.uses()):
                if node in readers:
                    node.replace_input_with(position, last)
        for node in tail.nodes:
            for value in node.outputs:
                value.shape = None  # what the file says holds for all rows
        first = next(node for node in model.graph if node in readers)
        model.graph.insert_before(first, build.nodes)
        model.graph.sort()
        self.tail_sizes = tail.projection_sizes()
        if logits.shape is not None:
            batch, _, vocabulary = logits.shape
            logits.shape = ir.Shape([batch, 1, vocabulary])
        return ir.passes.PassResult(model, True)

    def _keeps_rows_apart(self, head: LanguageModelHead) -> bool:
        """Whether no Reshape between head and logits counts rows, as heads of flat rows need it."""
        value: ir.Value | None = self._roles.logits
        while value is not None:
            node = value.producer()
            if node is None or node is head.node:
                return True
            if is_op(node, "Reshape") and not _copies_rows(node, head.hidden):
                return False
            value = next((x for x in node.inputs if not is_constant(x)), None)
        return True

    def _row_index(self, model: ir.Model, build: GraphBuilder, rows: ir.Value) -> ir.Value:
        """`row_end - 1 - start - (S - R)`, from 0 to `R - 1`; `start = max(0, seqlens_k + 1 - S)`.

        `R` is the number of rows that the head is given: `S`, or fewer where the source keeps
        the last ones alone, by itself or as its input num_logits_to_keep says.
        """
        node = AttentionNode.all_of(model.graph)[0]
        length = build.dimension(self._roles.input_ids, 1)
        given = build.dimension(rows, 1)
        seqlens = build.cast(node.seqlens_k, ir.DataType.INT64)
        end = build.op("Add", seqlens, build.ints(1))
        start = build.op("Max", build.op("Sub", end, length), build.ints(0))
        past_last = build.op("Sub", build.cast(self._row_end, ir.DataType.INT64), start)
        before = build.op("Sub", length, given)
        most = build.op("Sub", given, build.ints(1))
        index = build.op("Sub", build.op("Sub", past_last, before), build.ints(1))
        return build.op("Max", build.op("Min", index, most), build.ints(0))


def _copies_rows(reshape: ir.Node, hidden: ir.Value) -> bool:
    """Whether hidden states `[B, S, width]` lead to a Reshape that takes `S` as it comes."""
    wanted = small_constant(needed_input(reshape, 1))
    if wanted is None or rank(hidden) != _LOGITS_RANK:
        return False
    return wanted.size == _LOGITS_RANK and int(wanted.reshape(-1)[1]) in (0, -1)
