"""What of an attention operator is carried, by name; whatever else a node has is refused by name.

Operators grow: a new version brings optional inputs and attributes that change what a node means.
Therefore each pattern lists what it reads, and nothing is let through for being unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import onnx_ir as ir
from trianglemix.exporter.graph.walk import optional_input

Allows = Callable[[Any], bool]
_LONGEST: Final = 40


@dataclass(frozen=True)
class Carried:
    """The inputs, outputs and attributes of an operator's node that a pattern carries.

    `inputs` are the names by index, of all that the operator is known to have; those in `refused`
    are known, and have no counterpart. `attributes` say which values are carried.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Allows]
    refused: Mapping[str, str] = field(default_factory=dict)

    def trouble(self, node: ir.Node) -> str | None:
        """The first thing about the node that is not carried, by its name; None if all is."""
        return self._input(node) or self._output(node) or self._attribute(node)

    def _input(self, node: ir.Node) -> str | None:
        for index in range(len(node.inputs)):
            value = optional_input(node, index)
            if value is None:
                continue
            if index >= len(self.inputs):
                return (
                    f"its input {index} ({value.name}) is not one that trianglemix knows of "
                    f"{node.op_type}, so what it means is not known either"
                )
            name = self.inputs[index]
            if name in self.refused:
                return f"its input {name} {self.refused[name] or NO_COUNTERPART}"
        return None

    def _output(self, node: ir.Node) -> str | None:
        for index, output in enumerate(node.outputs):
            name = self.outputs[index] if index < len(self.outputs) else f"{index} ({output.name})"
            is_carried = index < len(self.outputs) and name not in self.refused
            if not is_carried and (output.uses() or output.is_graph_output()):
                return f"its output {name} is used, which TriangleAttention never makes"
        return None

    def _attribute(self, node: ir.Node) -> str | None:
        for name, attribute in node.attributes.items():
            allows = self.attributes.get(name)
            if allows is None or not allows(attribute.value):
                return f"its attribute {name}={_shown(attribute.value)} {NO_COUNTERPART}"
        return None


NO_COUNTERPART: Final = "has no counterpart in TriangleAttention"


def anything(value: Any) -> bool:
    """The pattern reads the attribute, or it does not change what the node computes."""
    return True


def only(*values: object) -> Allows:
    """These values alone are carried."""
    return lambda value: value in values


def at_least(least: float) -> Allows:
    """Numbers from `least` on."""
    return lambda value: isinstance(value, int | float) and value >= least


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
