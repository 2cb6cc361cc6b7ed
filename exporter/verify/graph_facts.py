"""What of the graphs decides how `--verify` may feed them, and how far."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir
from trianglemix.exporter.configuration.position_tables import table_length
from trianglemix.exporter.graph.attention_node import AttentionNode
from trianglemix.exporter.graph.walk import constant_array
from trianglemix.exporter.verify.session import DROPPING

_FEW: Final = 16
_MOST_IDS: Final = 256
_DYNAMIC: Final = frozenset(
    {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulInteger", "QAttention",
     "MatMulIntegerToFloat"}
)  # fmt: skip


@dataclass(frozen=True)
class GraphFacts:
    """What decides how graphs may be fed.

    `ids` are whole numbers that stand in the source; `dynamic_scales`: it scales whole tensors by
    what they hold, so that pads change every row; `one_token_after_past`: a node whose kernel may
    take one token at a time there; `source_has_it`: the source has such a node as well;
    `positions`: where the source's tables of positions end.
    """

    ids: tuple[int, ...]
    dynamic_scales: bool
    one_token_after_past: bool
    source_has_it: bool = False
    positions: int | None = None


def graph_facts(source: Path, exported: Path) -> GraphFacts:
    """From the graphs, without their weights."""
    graph = ir.load(source).graph
    kinds = {node.op_type for node in graph.all_nodes()}
    ours = {node.op_type for node in ir.load(exported).graph}
    return GraphFacts(
        ids=_whole_numbers(graph),
        dynamic_scales=bool(kinds & _DYNAMIC),
        one_token_after_past="GroupQueryAttention" in kinds | ours,
        source_has_it="GroupQueryAttention" in kinds,
        positions=table_length(graph),
    )


def _whole_numbers(graph: ir.Graph) -> tuple[int, ...]:
    """Of integer constants of few elements."""
    tensors = [value.const_value for value in graph.initializers.values()]
    tensors += [
        node.attributes["value"].as_tensor()
        for node in graph.all_nodes()
        if node.op_type == "Constant" and "value" in node.attributes
    ]
    found: set[int] = set()
    for tensor in tensors:
        if tensor is not None and tensor.dtype.is_integer() and tensor.size <= _FEW:
            found.update(int(number) for number in np.ravel(constant_array(tensor)))
    return tuple(sorted(found)[:_MOST_IDS])


def source_limit(path: Path) -> tuple[int | None, list[str]]:
    """The longest such prompt (tokens), and a note; None and no note where there is no limit.

    A source may be an export itself. Another choice of layers, or its dense twin, gives its
    logits up to this length only.
    """
    limits = [
        limit
        for node in AttentionNode.all_of(ir.load(path).graph)
        if node.role in DROPPING and (limit := node.rule.exact_length) is not None
    ]
    if not limits:
        return None, []
    note = (
        "verify: the source drops keys itself in some layers; compared where it drops nothing, "
        f"up to {min(limits)} tokens"
    )
    return min(limits), [note]
