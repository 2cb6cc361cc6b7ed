"""The windows of `Attention` since opset 25, which ONNX Runtime runs since 1.32.

A `left_window_size` of W keeps W + 1 keys by its specification. With an older ONNX Runtime the
export is compared with the same model whose mask operand has that window.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir
import pytest
from trianglemix.exporter.attention.sites import AttentionSite, MatchContext, Refusal
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.graph.roles import find_roles
from trianglemix.exporter.options import ExportOptions
from trianglemix.exporter.pipeline import export
from trianglemix.exporter.registry import all_patterns

from tests.sources.cell import SilentObserver
from tests.sources.comparison import Feeding, Outcome, compare_models

_PATTERN: Final = next(pattern for pattern in all_patterns() if pattern.name == "attention")


def _model(opset: int = 25, *, operand: bool = True, **attributes: int) -> ir.Model:
    model = _PATTERN.example().model
    model.graph.opset_imports[""] = opset
    for node in _attentions(model):
        if not operand:
            node.replace_input_with(3, None)
        for name, value in attributes.items():
            node.attributes[name] = ir.AttrInt64(name, value)
    return model


def _attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Attention"]


def _masked(window: int) -> ir.Model:
    """The same decoder at opset 23; its mask operand keeps `window` keys of a row."""
    model = _model(23)
    width = ir.Value(name="width", const_value=ir.tensor(np.array(window), name="width"))
    model.graph.register_initializer(width)
    for node in [node for node in model.graph if node.op_type == "LessOrEqual"]:
        key, row = node.inputs
        reach = ir.node("Sub", [row, width])
        near = ir.node("Greater", [key, reach.outputs[0]])
        both = ir.node("And", [node.outputs[0], near.outputs[0]])
        users = list(node.outputs[0].uses())
        model.graph.insert_after(node, [reach, near, both])
        for user, index in users:
            if user is not both:
                user.replace_input_with(index, both.outputs[0])
    return model


def _export(model: ir.Model, folder: Path) -> tuple[Path, Path]:
    folder.mkdir()
    source, output = folder / "source.onnx", folder / "out"
    ir.save(model, source)
    export(ExportOptions(source, output, dense=True), SilentObserver())
    return source, output / "model.onnx"


def _matched(model: ir.Model) -> AttentionSite | Refusal:
    context = MatchContext(model.graph, find_roles(model.graph))
    return _PATTERN.match(_attentions(model)[0], context)


@pytest.mark.parametrize(
    ("attributes", "window"),
    [
        ({"left_window_size": 4}, 5),
        ({"left_window_size": 0, "is_causal": 1}, 1),
        ({"left_window_size": 6, "right_window_size": 0}, 7),
        ({"left_window_size": 3, "is_causal": 1, "right_window_size": 2}, 4),
    ],
)
def test_a_window_beside_a_mask(attributes: dict[str, int], window: int, tmp_path: Path) -> None:
    model = _model(**attributes)
    exported = _export(model, tmp_path / "windowed")[1]
    source = _export(_masked(window), tmp_path / "masked")[0]
    outcome, detail = compare_models(source, exported, Feeding.of(model))
    assert outcome is Outcome.SAME, detail


@pytest.mark.parametrize(
    ("attributes", "window"),
    [
        ({"is_causal": 1}, None),
        ({"right_window_size": 0}, None),
        ({"is_causal": 1, "left_window_size": 64}, 65),
        ({"left_window_size": 700, "right_window_size": 0}, 701),
        ({"is_causal": 1, "left_window_size": -1, "right_window_size": -1}, None),
    ],
)
def test_without_a_mask_operand(attributes: dict[str, int], window: int | None) -> None:
    """No padding is skipped then, nor does the export skip any."""
    site = _matched(_model(operand=False, **attributes))
    assert isinstance(site, AttentionSite), site
    assert site.mask.window == window
    assert site.lengths is not None


def test_a_causal_node_without_a_mask_operand_is_carried(tmp_path: Path) -> None:
    """The example's mask hides padding besides, so that batches without any are compared."""
    model = _model(operand=False, is_causal=1)
    source, exported = _export(model, tmp_path / "bare")
    outcome, detail = compare_models(source, exported, Feeding.of(model))
    assert outcome is Outcome.SAME, detail


@pytest.mark.parametrize(
    ("operand", "attributes", "word"),
    [
        (True, {"right_window_size": 1}, "keys after its own"),
        (False, {"left_window_size": 8}, "not causal"),
        (False, {"left_window_size": 8, "right_window_size": 3}, "keys after its own"),
        (False, {}, "neither causal"),
        (True, {"left_window_size": -2}, "left_window_size=-2"),
    ],
)
def test_what_is_no_window_is_refused(
    operand: bool, attributes: dict[str, int], word: str, tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match=word):
        _export(_model(operand=operand, **attributes), tmp_path / "refused")


@pytest.mark.parametrize(
    ("attributes", "named"), [({"left_window_size": 4}, "left_window_size"), ({}, "is_causal")]
)
def test_bounds_that_count_from_the_new_tokens_are_refused(
    attributes: dict[str, int], named: str
) -> None:
    """With the cache joined before the node a row's position is that among the new tokens."""
    model = _model(is_causal=1, operand=False, **attributes)
    graph = model.graph
    for node in _attentions(model):
        for index in (1, 2):
            rows, past = node.inputs[index], node.inputs[3 + index]
            shape = ir.Value(
                name=f"shape_{node.name}_{index}",
                const_value=ir.tensor(np.array([0, 0, 2, 16]), name=f"shape_{node.name}_{index}"),
            )
            graph.register_initializer(shape)
            apart = ir.node("Reshape", [rows, shape])
            turned = ir.node("Transpose", [apart.outputs[0]], attributes={"perm": [0, 2, 1, 3]})
            joined = ir.node("Concat", [past, turned.outputs[0]], attributes={"axis": 2})
            back = ir.node("Transpose", [joined.outputs[0]], attributes={"perm": [0, 2, 1, 3]})
            flat = ir.Value(
                name=f"flat_{node.name}_{index}",
                const_value=ir.tensor(np.array([0, 0, -1]), name=f"flat_{node.name}_{index}"),
            )
            graph.register_initializer(flat)
            merged = ir.node("Reshape", [back.outputs[0], flat])
            graph.insert_before(node, [apart, turned, joined, back, merged])
            node.replace_input_with(index, merged.outputs[0])
            node.outputs[index].replace_all_uses_with(joined.outputs[0], replace_graph_outputs=True)
        node.resize_inputs(4)
    refusal = _matched(model)
    assert isinstance(refusal, Refusal)
    assert f"its {named} counts from the first new token" in refusal.reason
