"""Attention by operators that no pattern reads: refused by name, since none may stay unseen."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

import onnx_ir as ir
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.graph.roles import GraphRoles, find_roles

_CONTRIB: Final = "com.microsoft"
_STANDARD: Final = ("", "ai.onnx")
_DENSE: Final = "build the model with dense attention (GroupQueryAttention)"
_UNFUSED: Final = (
    "export the model without that fusion (onnxruntime's optimizer: "
    "FusionOptions.use_multi_head_attention = True, or enable_attention = False)"
)
_QUANTISED: Final = "computes attention in integers; quantise the weights alone"
_CHOOSES: Final = f"chooses the keys of a sparse attention that follows it; {_DENSE}"
_PACKED: Final = "packs the rows of a batch without their padding; export the model without that"
_REASONS: Final = {
    "Attention": f"projects queries, keys and values itself, by packed weights; {_UNFUSED}",
    "DynamicSparseAttention": f"reads only the keys that an indexer has selected; {_DENSE}",
    "SparsePagedAttention": f"reads only selected keys of a cache in pages; {_DENSE}",
    "SparseAttention": f"reads only the key blocks of a mask of its own; {_DENSE}",
    "SparseAttentionIndexer": _CHOOSES,
    "PackedSparseAttentionIndexer": _CHOOSES,
    "PackedSparseAttentionIndexerMerge": _CHOOSES,
    "PagedAttention": "keeps its cache in pages of a block table; build the model with plain "
    "caches (GroupQueryAttention)",
    "DecoderMaskedMultiHeadAttention": "takes one token at a time, and no prompt; export the "
    "model as it was before it was converted for beam search",
    "DecoderMaskedSelfAttention": "takes one token at a time, and no prompt; export the model as "
    "it was before it was converted for beam search",
    "DecoderAttention": "is an encoder-decoder's; export a decoder-only model",
    "PackedAttention": _PACKED,
    "PackedMultiHeadAttention": _PACKED,
    "QAttention": _QUANTISED,
    "QOrderedAttention": _QUANTISED,
    "QOrderedLongformerAttention": _QUANTISED,
    "LongformerAttention": "is an encoder's, with global tokens; export a causal language model",
    "DisentangledAttention_TRT": "adds scores of relative positions; it has no counterpart in "
    "TriangleAttention",
    "FlexAttention": "changes its scores by a graph of its own; export the model with the "
    "standard Attention, or with plain operators",
}  # fmt: skip
_KEEPS_STATE: Final = frozenset(
    {"LinearAttention", "LinearAttentionGate", "CausalConvWithState", "VarlenCausalConvWithState",
     "ConvStateReplay"}
)  # fmt: skip
_SCALES_ONLY: Final = frozenset({"LinearAttentionGate", "ConvStateReplay"})


def foreign_attention(
    graph: ir.Graph, known: Collection[tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    """Name of each node that is attention and must not stay, and why; branches are looked at too.

    `known`: `(domain, op_type)` of nodes that the patterns read where they stand in the graph.
    """
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if "Attention" not in node.op_type or keeps_state(node):
            continue
        domain = "" if node.domain in _STANDARD else node.domain
        label = node.name or node.outputs[0].name or node.op_type
        if (domain, node.op_type) not in known:
            yield label, _reason(node)
        elif node.graph is not graph:
            reason = (
                f"{node.op_type} stands inside a branch (If, Loop or Scan), where attention is "
                "not looked for; export the model without control flow around its layers"
            )
            yield label, reason


def keeps_state(node: ir.Node) -> bool:
    """Whether a node keeps a state of one size instead of keys and values: it stays as it is."""
    return node.op_type in _KEEPS_STATE and node.domain in (*_STANDARD, _CONTRIB)


def state_layers(graph: ir.Graph) -> tuple[str, ...]:
    """A note on the layers that keep a state, if there are any."""
    count: dict[str, int] = {}
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if keeps_state(node) and node.op_type not in _SCALES_ONLY:
            count[node.op_type] = count.get(node.op_type, 0) + 1
    if not count:
        return ()
    nodes = " and ".join(f"{number} {name}" for name, number in sorted(count.items()))
    return (f"{nodes} nodes stay as they are: they keep a state, not keys and values",)


def roles_of(graph: ir.Graph, known: Collection[tuple[str, str]]) -> GraphRoles:
    """The graph's roles.

    Raises:
        RefusedError: a role is missing; foreign attention comes first, for it may be the cause.
    """
    try:
        return find_roles(graph)
    except RefusedError as error:
        for name, reason in foreign_attention(graph, known):
            raise RefusedError(f"attention at node {name}: {reason} (besides, {error})") from error
        raise


def _reason(node: ir.Node) -> str:
    reason = _REASONS.get(node.op_type)
    if reason is None or node.domain not in (*_STANDARD, _CONTRIB, "ai.onnx.preview"):
        return (
            f"{node.op_type} of the domain {node.domain or 'ai.onnx'} is not an attention that "
            "trianglemix knows; export the model with the standard Attention, with "
            "GroupQueryAttention, or with plain operators"
        )
    return f"{node.op_type} {reason}"
