"""Faults to plant in the product, one a kind, and the odd models that must show them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import onnx_ir as ir
from trianglemix.exporter.attention import mask_probe
from trianglemix.exporter.attention.cutout import CutError
from trianglemix.exporter.attention.sites import MaskClass
from trianglemix.exporter.graph import roles as graph_roles
from trianglemix.exporter.graph.attention_node import AttentionNode
from trianglemix.exporter.normalize import steps as normalize
from trianglemix.exporter.onnx_file import model_file as model_io
from trianglemix.exporter.patterns import _softmax_measure, _softmax_rows
from trianglemix.exporter.patterns.group_query_attention import GroupQueryAttentionPattern
from trianglemix.exporter.rewrite.last_token import KeepLastLogitsPass
from trianglemix.manifest import feeds

from tests.odd.odd_model import CARRIED_ATTRIBUTES, OddModel
from tests.odd.scales import SCALES
from tests.odd.trial import Depth


@dataclass(frozen=True)
class Plant:
    """Each `name` of an `owner` becomes its fault; models that `shows` names must end otherwise."""

    faults: tuple[tuple[Any, str, Any], ...]
    shows: Callable[[OddModel], bool]
    depth: Depth = field(default_factory=Depth)


def _near(model: OddModel) -> bool:
    """A small cached model without other oddities, quick to run."""
    quiet = model.extra == "nothing" and model.storage == "inside" and not model.branches
    return model.cache == "BHTD" and quiet and model.size < 120 and model.dtype == "float32"


def _of_mask(*kinds: str) -> Callable[[OddModel], bool]:
    return lambda model: _near(model) and model.mask in kinds and SCALES[model.scale].carried


def _causal(*arguments: Any) -> MaskClass:
    return MaskClass()


def _nothing(*arguments: Any) -> None:
    return None


def _of_the_graph_alone(model: Any) -> list[Any]:
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]


_row_index = KeepLastLogitsPass._row_index


def _row_of_all(self: Any, model: Any, build: Any, rows: Any) -> Any:
    return _row_index(self, model, build, self._roles.input_ids)


class _Unsorted(normalize.SortNodesPass):  # type: ignore[misc]
    def call(self, model: Any) -> Any:
        return ir.passes.PassResult(model, False)


PLANTS: Final[dict[str, Plant]] = {
    "every mask is taken for causal": Plant(
        ((_softmax_rows, "measure_class", _causal),),
        _of_mask("floats", "bool_buffer", "chunk", "less"),
    ),
    "rows are not compared with the window found": Plant(
        ((mask_probe.Expected, "check", _nothing),), _of_mask("float_chunk", "early_rows")
    ),
    "a scale that changes with the length is taken as it stands": Plant(
        (
            (mask_probe._Check, "_same_ratios", _nothing),
            (_softmax_measure, "_check_factors", _nothing),
        ),
        lambda model: model.scale == "log_of_total" and model.size > 700,
    ),
    "a bias beyond a length is taken for where the mask ends": Plant(
        ((mask_probe, "CutRunError", CutError),),
        lambda model: _near(model) and model.scale == "far_bias" and model.size > 60,
    ),
    "inputs and attributes of a node are not looked at": Plant(
        ((GroupQueryAttentionPattern, "trouble", _nothing),),
        lambda model: model.attribute not in (*CARRIED_ATTRIBUTES, "attention_bias"),
    ),
    "a layer's own window is not known again": Plant(
        ((AttentionNode, "never_last", property(lambda node: False)),),
        lambda model: _of_mask("less", "product")(model) and model.spelling == "softmax",
        Depth(again=True),
    ),
    "the first output is taken for the logits": Plant(
        ((graph_roles, "_logits", lambda graph: graph.outputs[0]),),
        lambda model: model.extra == "router_first" and model.can_be_exported,
        Depth(run=True),
    ),
    "token ids are fed as positions": Plant(
        ((feeds, "_MAKERS", {**feeds._MAKERS, "position_ids": lambda value, call: call.ids}),),
        lambda model: _near(model) and model.positions == "rank2" and model.can_be_exported,
        Depth(run=True),
    ),
    "weights of branches stay behind": Plant(
        ((model_io, "external_tensors", _of_the_graph_alone),),
        lambda model: model.branches and model.storage != "inside" and model.can_be_exported,
    ),
    "the last row is picked where one is left": Plant(
        ((KeepLastLogitsPass, "_row_index", _row_of_all),),
        lambda model: model.extra == "last_row" and model.can_be_exported,
        Depth(last=True),
    ),
    "nodes are not sorted": Plant(
        ((normalize, "SortNodesPass", _Unsorted),),
        lambda model: _near(model) and model.shuffled and model.can_be_exported,
    ),
}
