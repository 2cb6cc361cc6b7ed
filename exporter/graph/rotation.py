"""Unpacking and rotation that an attention node does inside, as nodes of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx_ir as ir
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.graph_builder import AttributeValue, GraphBuilder
from trianglemix.exporter.graph.walk import is_op, static_size

DOMAIN: Final = "com.microsoft"


@dataclass(frozen=True)
class Rotation:
    """How queries and keys turn: tables `[M, R/2]`, and whether neighbours or halves pair up."""

    cosines: ir.Value
    sines: ir.Value
    interleaved: bool


def head_size(
    past: ir.Value | None, query: ir.Value | None, heads: int, cosines: ir.Value | None
) -> int | None:
    """D as a file states it: in a cache `[B, G, T, D]`, in rows of `heads` heads, in the tables.

    genai's graphs give their caches a name instead of a number there.
    """
    size = static_size(past, 3)
    if size is None:
        width = static_size(query, 2)
        size = width // heads if width and heads and width % heads == 0 else None
    half = static_size(cosines, 1)
    return 2 * half if size is None and half is not None else size


def unpack(
    build: GraphBuilder, packed: ir.Value, shape: AttentionShape
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Queries, keys and values `[B, S, heads*D]` of one tensor `[B, S, (H+2G)*D]`.

    Raises:
        ConfigurationError: the file states another width.
    """
    widths = [n * shape.head_size for n in (shape.num_heads, *[shape.kv_num_heads] * 2)]
    stated = packed.shape[-1] if packed.shape else None
    if isinstance(stated, int) and stated != sum(widths):
        raise ConfigurationError(
            f"its packed projections are {stated} wide, but {shape.num_heads} heads and twice "
            f"{shape.kv_num_heads} key/value heads of {shape.head_size} need {sum(widths)}"
        )
    sizes = build.ints(*widths)
    split = build.node("Split", [packed, sizes], attributes={"axis": -1}, num_outputs=3)
    query, key, value = split.outputs
    return query, key, value


def slot_positions(build: GraphBuilder, seqlens: ir.Value, rows: ir.Value) -> ir.Value:
    """`[B, S]` int64: row b's new tokens stand at `max(0, seqlens_k + 1 - S) + s`.

    `rows` is any tensor whose second axis is S.
    """
    length = build.dimension(rows, 1)
    end = build.op("Add", build.cast(seqlens, ir.DataType.INT64), build.ints(1))
    start = build.op("Max", build.op("Sub", end, length), build.ints(0))
    new = build.range_to(length)
    return build.op(
        "Add",
        build.unsqueeze(start, 1),
        build.unsqueeze(new, 0),
    )


def rotate(
    build: GraphBuilder, rows: ir.Value, heads: tuple[int, int], rotation: Rotation, at: ir.Value
) -> ir.Value:
    """`rows [B, S, heads*D]` turned at the slot positions `at`; `heads` is their count and D.

    A part of each head turns where the tables are narrower than half a head. Where the file does
    not say how wide they are, whole heads have to turn: ONNX Runtime up to 1.24 would take the
    head's size from the tables, silently, and now it refuses to run narrower ones.
    """
    count, size = heads
    attributes: dict[str, AttributeValue] = {
        "num_heads": count,
        "interleaved": int(rotation.interleaved),
    }
    half = _table_width(rotation.cosines)
    if half is None or 2 * half != size:
        attributes["rotary_embedding_dim"] = size if half is None else 2 * half
    inputs = [rows, at, rotation.cosines, rotation.sines]
    node = build.node("RotaryEmbedding", inputs, domain=DOMAIN, attributes=attributes)
    return node.outputs[0]


def _table_width(table: ir.Value | None) -> int | None:
    """R/2 of a table `[M, R/2]`, where the file states it; of one that an If chooses, too.

    genai's long-context models choose between two pairs of tables, and give the chosen ones'
    dimensions names only.
    """
    width = static_size(table, 1)
    node = None if table is None else table.producer()
    if table is None or node is None or width is not None:
        return width
    if is_op(node, "If"):
        index = node.outputs.index(table)
        branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
        widths = {_table_width(branch.outputs[index]) for branch in branches}
        return widths.pop() if len(widths) == 1 else None
    tensor = ir.convenience.get_const_tensor(table)
    known = tensor is not None and len(tensor.shape) == 2
    return tensor.shape.numpy()[1] if tensor is not None and known else None
