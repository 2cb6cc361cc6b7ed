"""What every source pattern shares: refusals by name, and the site that one attention node states.

A new pattern is a subclass of `SitePattern` in a file of its own; `multi_head_attention.py` is the
one to copy. It says at which nodes it starts, why a node may not be taken, how one is read,
and shows a tiny example model, which the shared tests then export and compare.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import onnx_ir as ir
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.exporter.attention.cutout import CutError
from trianglemix.exporter.attention.sites import (
    AttentionSite,
    Example,
    Layout,
    MaskClass,
    MatchContext,
    Operand,
    Refusal,
)
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.graph.walk import dtype_of, needed_input, optional_input
from trianglemix.exporter.patterns._node_walk import KeysAndValues


class NotAttentionError(ExportError):
    """The anchor node belongs to no attention, so it may stay in the graph as it is."""


class SitePattern(ABC):
    """One source spelling: `anchors` holds `(domain, op_type)` of the nodes where it starts."""

    name: str
    anchors: frozenset[tuple[str, str]]

    def match(self, node: ir.Node, context: MatchContext) -> AttentionSite | Refusal:
        """The site at an anchor node, or why there is none."""
        label = node.name or node.outputs[0].name or node.op_type
        trouble = self.trouble(node)
        if trouble is not None:
            return Refusal(label, trouble)
        try:
            return self.read(node, context)
        except NotAttentionError as error:
            return Refusal(label, str(error), is_attention=False)
        except (ConfigurationError, CutError) as error:
            return Refusal(label, str(error))

    def trouble(self, node: ir.Node) -> str | None:
        """Why the node's meaning is not the operator's, if its inputs and attributes tell."""
        return None

    @abstractmethod
    def read(self, node: ir.Node, context: MatchContext) -> AttentionSite:
        """The site at a node that `trouble` found nothing against.

        Raises:
            CutError, ConfigurationError: it is not attention as the operator means it.
            NotAttentionError: it is no attention at all.
        """

    @abstractmethod
    def example(self) -> Example:
        """A tiny model in this spelling."""

    def site(
        self, node: ir.Node, shape: AttentionShape, query: Operand, cached: KeysAndValues
    ) -> AttentionSite:
        """The site as a node's attributes `scale` and `softcap` and its operands state it.

        A causal mask and flat rows in the first output are taken for granted here. A pattern
        that knows better replaces them; one that knows less measures (`_node_measure`).
        """
        return AttentionSite(
            layer=-1,
            form=self.name,
            anchor=node,
            shape=shape,
            scale=_scale(node, shape.head_size),
            softcap=node.attributes.get_float("softcap", 0.0),
            mask=MaskClass(),
            query=query,
            key=cached.key,
            value=cached.value,
            past=cached.past,
            present=cached.present,
            output=Operand(node.outputs[0], Layout.FLAT),
            cache=cached.layouts,
            dtype=dtype_of(needed_input(node, 0)),
        )


def cache_trouble(node: ir.Node, past: tuple[int, int]) -> str | None:
    """Why a cache inside the node cannot be carried; `past` holds its two inputs' numbers."""
    given = [optional_input(node, index) is not None for index in past]
    if given[0] != given[1]:
        return "it has only one of past_key and past_value"
    if all(given) and len(node.outputs) < 3:
        return "it does not hand out its present key and value"
    return None


def packing_trouble(node: ir.Node) -> str | None:
    """Why inputs 0 to 2 are neither queries, keys and values nor all of them packed."""
    if (optional_input(node, 1) is None) != (optional_input(node, 2) is None):
        return "it has only one of key and value"
    return None


def _scale(node: ir.Node, head_size: int) -> float:
    """The node's scale; 0 stands for an absent one, and a rounded default is the default."""
    scale = node.attributes.get_float("scale", 0.0)
    default = head_size**-0.5
    return default if scale == 0.0 or math.isclose(scale, default, rel_tol=1e-5) else scale
