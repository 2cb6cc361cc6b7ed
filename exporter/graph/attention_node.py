"""One typed view of a node of our operators: its inputs by name, its attributes, its role.

Everything that reads such a node reads it here. What role its layer has stands in the node and in
what computes its lengths, never in a name, which any graph optimizer may change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.block_sparse.contract import OP_TYPE as BLOCK_SPARSE
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.block_sparse.reference import BlockSparse
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.custom_ops.operators import is_ours
from trianglemix.custom_ops.triangle.contract import OP_TYPE as TRIANGLE
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.custom_ops.triangle.reference import Attention
from trianglemix.exporter.graph.rotation import Rotation, head_size
from trianglemix.exporter.graph.walk import constant_array, is_op, needed_input, optional_input

NEVER_LAST: Final = int(np.iinfo(np.int32).max)
"""`prompt_length` of a layer that only slides: no row is ever one of the last ones."""
_INDEX: Final = {name: index for index, name in enumerate(contract.INPUTS)}
_COSINES: Final = len(contract.INPUTS)
_MOVES: Final = ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Expand", "Flatten", "Tile")
_MAX_STEPS: Final = 12

Rule = TrianglePattern | BlockRule
"""Which keys a row keeps, and with it which operator says so."""
_RULES: Final[dict[str, type[Rule]]] = {TRIANGLE: TrianglePattern, BLOCK_SPARSE: BlockRule}


class LayerRole(Enum):
    """What a layer does with keys that the source model lets a row see."""

    DENSE = "dense"
    WINDOWED = "windowed"  # a sliding window of the source's own, and nothing else
    TRIANGLE = "triangle"  # drops the keys between sinks and window
    BLOCK_SPARSE = "block-sparse"  # drops blocks of keys by what the scores say


@dataclass(frozen=True)
class AttentionNode:
    """A node of one of our operators; absent attributes have the contract's defaults."""

    node: ir.Node

    @classmethod
    def all_of(cls, nodes: Iterable[ir.Node]) -> list[AttentionNode]:
        """Those of a graph, in its order, which is the order of the layers."""
        return [cls(node) for node in nodes if is_attention(node)]

    @property
    def query(self) -> ir.Value:
        """Queries `[B, S, H*D]`, or queries, keys and values packed."""
        return needed_input(self.node, _INDEX["query"])

    @property
    def key(self) -> ir.Value | None:
        """New keys, None where they are packed with the queries."""
        return optional_input(self.node, _INDEX["key"])

    @property
    def value(self) -> ir.Value | None:
        """New values, None where they are packed with the queries."""
        return optional_input(self.node, _INDEX["value"])

    @property
    def past(self) -> tuple[ir.Value, ir.Value]:
        """The cache before the call."""
        index = _INDEX["past_key"]
        return needed_input(self.node, index), needed_input(self.node, index + 1)

    @property
    def present(self) -> tuple[ir.Value, ir.Value]:
        """The cache after the call."""
        _, key, value, *_ = self.node.outputs
        return key, value

    @property
    def seqlens_k(self) -> ir.Value:
        """End of each row's keys, minus one."""
        return needed_input(self.node, _INDEX["seqlens_k"])

    @property
    def total_sequence_length(self) -> ir.Value:
        """The largest end of a row's keys."""
        return needed_input(self.node, _INDEX["total_sequence_length"])

    @property
    def prompt_length(self) -> ir.Value:
        """`N` of the formula."""
        return needed_input(self.node, _INDEX["prompt_length"])

    @property
    def first_valid(self) -> ir.Value:
        """Each row's first real key."""
        return needed_input(self.node, _INDEX["first_valid"])

    @property
    def lengths_and_past(self) -> tuple[ir.Value | None, ...]:
        """Inputs from the past to `first_valid`, in the contract's order."""
        return tuple(self.node.inputs[_INDEX["past_key"] : _COSINES])

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.node.attributes.get_int(contract.ATTR_NUM_HEADS, 0)

    @property
    def kv_num_heads(self) -> int:
        """Key and value heads."""
        return self.node.attributes.get_int(contract.ATTR_KV_NUM_HEADS, 0)

    @property
    def scale(self) -> float:
        """0 stands for `1/sqrt(D)`."""
        return self.node.attributes.get_float(contract.ATTR_SCALE, 0.0)

    @property
    def softcap(self) -> float:
        """0 stands for none."""
        return self.node.attributes.get_float(contract.ATTR_SOFTCAP, 0.0)

    @property
    def rule(self) -> Rule:
        """Which keys it keeps, as the operator reads its attributes."""
        made = _RULES[self.node.op_type]
        values: dict[str, Any] = {
            name: _read(self.node, name, default)
            for name, default in made().as_attributes().items()
        }
        return made(**values)

    @property
    def pattern(self) -> TrianglePattern:
        """Sinks, window and last rows of a node that is not block-sparse."""
        rule = self.rule
        assert isinstance(rule, TrianglePattern)
        return rule

    @property
    def role(self) -> LayerRole:
        """A window without sinks whose rows are never last ones is the source's own.

        A block-sparse node is one even where its rule keeps everything.
        """
        rule = self.rule
        if isinstance(rule, BlockRule):
            return LayerRole.BLOCK_SPARSE
        if rule.is_dense:
            return LayerRole.DENSE
        return LayerRole.WINDOWED if self.never_last else LayerRole.TRIANGLE

    @property
    def never_last(self) -> bool:
        """Whether its `prompt_length` is provably `NEVER_LAST` in every call."""
        return _provable(self.prompt_length, _is_never_last)

    @property
    def no_left_padding(self) -> bool:
        """Whether its `first_valid` is provably 0: its source knows no left padding."""
        return _provable(self.first_valid, _is_zero)

    @property
    def rotation(self) -> Rotation | None:
        """How it turns queries and keys inside, if it does."""
        cosines = optional_input(self.node, _COSINES)
        if cosines is None:
            return None
        interleaved = self.node.attributes.get_int(contract.ATTR_INTERLEAVED, 0) == 1
        return Rotation(cosines, needed_input(self.node, _COSINES + 1), interleaved)

    @property
    def is_folded(self) -> bool:
        """Whether it unpacks or rotates inside, which the function body cannot."""
        return self.key is None or self.rotation is not None

    @property
    def shape(self) -> AttentionShape:
        """The head layout, from the attributes and what the file states.

        Raises:
            ConfigurationError: the file does not say a head size.
        """
        rotation = self.rotation
        cosines = None if rotation is None else rotation.cosines
        past_key, past_value = (optional_input(self.node, _INDEX["past_key"] + n) for n in (0, 1))
        packed = self.value is None
        in_query = self.num_heads + 2 * self.kv_num_heads if packed else self.num_heads
        size = head_size(past_key, self.query, in_query, cosines)
        value_size = size
        if not packed and cosines is None:
            value_size = head_size(past_value, self.value, self.kv_num_heads, None)
        for name, found in (("keys", size), ("values", value_size)):
            if found is None:
                raise ConfigurationError(
                    f"the file does not say the head size of {self.node.name}'s {name}"
                )
        assert size is not None
        assert value_size is not None
        return AttentionShape(self.num_heads, self.kv_num_heads, size, value_size)

    def set_inputs(self, rows: Iterable[ir.Value | None], tables: Iterable[ir.Value] = ()) -> None:
        """Other queries, keys, values and rotation tables; past and lengths stay."""
        inputs = [*rows, *self.lengths_and_past, *tables]
        self.node.resize_inputs(len(inputs))
        for index, value in enumerate(inputs):
            self.node.replace_input_with(index, value)


def append_operator(
    build: GraphBuilder, inputs: Sequence[ir.Value | None], attention: Attention | BlockSparse
) -> ir.Node:
    """A new node of the attention's operator, with every attribute and no optional output.

    `inputs` are those of `contract.INPUTS`.
    """
    rule: Rule = attention.rule if isinstance(attention, BlockSparse) else attention.pattern
    return build.node(
        next(name for name, made in _RULES.items() if isinstance(rule, made)),
        inputs,
        domain=contract.DOMAIN,
        attributes={
            contract.ATTR_NUM_HEADS: attention.shape.num_heads,
            contract.ATTR_KV_NUM_HEADS: attention.shape.kv_num_heads,
            contract.ATTR_SCALE: float(attention.scale),
            contract.ATTR_SOFTCAP: float(attention.softcap),
            **rule.as_attributes(),
        },
        num_outputs=len(contract.OUTPUTS),
    )


def is_attention(node: ir.Node) -> bool:
    """Whether the node is one of our operators."""
    return is_ours(node.domain, node.op_type)


def functions_needed(graph: ir.Graph) -> set[ir.OperatorIdentifier]:
    """Of our operators, those that stand in the graph and whose every node a function can be."""
    ours = [node for node in graph if is_attention(node)]
    folded = {node.op_identifier() for node in ours if AttentionNode(node).is_folded}
    return {node.op_identifier() for node in ours} - folded


def functions_of_ours(model: ir.Model) -> set[ir.OperatorIdentifier]:
    """Our operators' functions that the model carries."""
    return {x.identifier() for x in model.functions.values() if is_ours(x.domain, x.name)}


def _read(node: ir.Node, name: str, default: float) -> float:
    """An attribute of the default's type; a float as it was written, not as float32 holds it."""
    if isinstance(default, int):
        return node.attributes.get_int(name, default)
    return float(f"{node.attributes.get_float(name, default):.7g}")


def _provable(value: ir.Value, holds: Callable[[ir.Value], bool]) -> bool:
    """Whether the value holds so, as it is or before it was cast, reshaped or expanded."""
    for _ in range(_MAX_STEPS):
        if holds(value):
            return True
        node = value.producer()
        if node is None or not is_op(node, *_MOVES):
            return False
        value = needed_input(node, 0)
    return False


def _is_never_last(value: ir.Value) -> bool:
    """The constant itself, or the larger of it and anything."""
    return _is_constant(value, NEVER_LAST) or _reads(value.producer(), "Max", NEVER_LAST)


def _is_zero(value: ir.Value) -> bool:
    """The constant, something minus itself, or something times 0."""
    node = value.producer()
    if node is not None and is_op(node, "Sub"):
        return node.inputs[0] is node.inputs[1]
    return _is_constant(value, 0) or _reads(node, "Mul", 0)


def _reads(node: ir.Node | None, op_type: str, number: int) -> bool:
    """Whether it is such a node, one of whose inputs is this constant."""
    inputs = node.inputs if node is not None and is_op(node, op_type) else ()
    return any(x is not None and _is_constant(x, number) for x in inputs)


def _is_constant(value: ir.Value, number: int) -> bool:
    """Whether the value is this number alone, however often; inputs with a default are not."""
    if value.is_graph_input():
        return False
    node = value.producer()
    if node is not None and is_op(node, "ConstantOfShape"):
        filled = node.attributes.get_tensor("value", None)
        return (0 if filled is None else int(filled.numpy().reshape(()))) == number
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or not 0 < tensor.size <= 1 << 10:
        return False
    return bool((constant_array(tensor) == number).all())
