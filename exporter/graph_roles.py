"""What the inputs and outputs of an LLM graph are for."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from trianglemix.exporter.errors import RefusedError

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class GraphRoles:
    """Graph inputs and outputs by their role; None where the graph has no such thing."""

    input_ids: ir.Value  # [B, S]
    attention_mask: ir.Value  # [B, T], 1 = a real token
    position_ids: ir.Value | None  # [B, S]
    logits: ir.Value  # [B, S, vocabulary]
    caches: tuple[ir.Value, ...]  # past keys and values, [B, G, P, D]

    @property
    def dtype(self) -> ir.DataType:
        """The type the model computes in: its caches', or else its logits'."""
        source = self.caches[0] if self.caches else self.logits
        return source.dtype or ir.DataType.FLOAT


def find_roles(graph: ir.Graph) -> GraphRoles:
    """Reads the roles from names, ranks and types.

    Raises:
        RefusedError: a role that every LLM graph must have is missing; the message lists what is
            there.
    """
    return GraphRoles(
        input_ids=_required(graph, "input_ids", _input_like(graph, "input_ids", 2)),
        attention_mask=_required(graph, "attention_mask", _input_like(graph, "attention_mask", 2)),
        position_ids=_input_like(graph, "position_ids", 2),
        logits=_logits(graph),
        caches=tuple(value for value in graph.inputs if is_cache(value)),
    )


def is_cache(value: ir.Value) -> bool:
    """Whether a graph input is a past key or value: floats of rank 4."""
    return value.dtype in _FLOATS and rank(value) == 4


def rank(value: ir.Value) -> int | None:
    """Number of axes, if the file says."""
    return None if value.shape is None else len(value.shape)


def _input_like(graph: ir.Graph, part: str, axes: int) -> ir.Value | None:
    exact = [value for value in graph.inputs if value.name == part]
    close = [value for value in graph.inputs if part in (value.name or "")]
    fitting = [value for value in exact or close if rank(value) in (axes, None)]
    return fitting[0] if fitting else None


def _required(graph: ir.Graph, role: str, value: ir.Value | None) -> ir.Value:
    if value is None:
        names = ", ".join(f"{x.name} {x.shape}" for x in list(graph.inputs)[:6])
        raise RefusedError(
            f"the graph has no input {role} [batch, length], so it is not a text decoder that "
            f"trianglemix knows (its inputs: {names or 'none'}); export a causal language model "
            "with input_ids and attention_mask"
        )
    return value


def _logits(graph: ir.Graph) -> ir.Value:
    named = [value for value in graph.outputs if "logits" in (value.name or "")]
    ranked = [value for value in graph.outputs if rank(value) == 3 and value.dtype in _FLOATS]
    found = named or ranked
    if not found:
        names = ", ".join(str(value.name) for value in list(graph.outputs)[:6])
        raise RefusedError(
            "the graph has no output logits [batch, length, vocabulary] "
            f"(its outputs: {names or 'none'}); export a causal language model"
        )
    return found[0]
