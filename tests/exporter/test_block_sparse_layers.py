"""Layers that an export makes block-sparse: what is written, what it computes, what is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import pytest
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.block_sparse.contract import OP_TYPE, BlockRule
from trianglemix.custom_ops.operators import add_function
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.graph.attention_node import AttentionNode, LayerRole
from trianglemix.exporter.layers.block_sparse_plan import BlockSparsePlan
from trianglemix.exporter.layers.plan import Fingerprint, Plan
from trianglemix.exporter.options import BlockRequest, LayerRequest
from trianglemix.exporter.patterns import group_query_attention
from trianglemix.manifest.manifest import Manifest

from tests.exporter import odd_models
from tests.exporter.command import Captured, Patch, run_main
from tests.exporter.example_oracle import example_logits
from tests.exporter.exports import Session, assert_close, export_to, random_ids, save_example

TOKENS: Final = 900  # seven tiles, of which the last two hold last rows
SPARSE: Final = BlockRequest((0, 1), mass=0.6, min_length=0)
RULE: Final = BlockRule(mass=0.6, min_length=0)
SMALL: Final = TrianglePattern(2, 6, 3)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_example(odd_models.peaked().model, tmp_path / "source")


def _plan(folder: Path, **section: Any) -> Path:
    shape = odd_models.peaked().shape
    model = Fingerprint(3, shape.num_heads, shape.kv_num_heads, shape.head_size)
    blocks = BlockSparsePlan(**{"layers": (0, 1), "rule": RULE, "origin": "by hand", **section})
    Plan("tiny", model, SMALL, triangle_layers=(2,), block_sparse=blocks).save(folder / "plan.json")
    return folder / "plan.json"


def _roles(folder: Path) -> list[LayerRole]:
    return [node.role for node in AttentionNode.all_of(ir.load(folder / "model.onnx").graph)]


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "function"])
def test_the_export_computes_the_rule(source: Path, kernel: bool, tmp_path: Path) -> None:
    export_to(source, tmp_path / "out", layers=(2,), blocks=SPARSE)
    example, ids = odd_models.peaked(), random_ids(1, TOKENS)
    got = Session.of(tmp_path / "out", kernel=kernel).logits(ids)
    assert_close(got, example_logits(example, ids, {0: RULE, 1: RULE, 2: SMALL}))
    dense = example_logits(example, ids, {2: SMALL})
    assert np.abs(got - dense).max() > 3e-2, "the rule dropped nothing: no test at all"


@pytest.mark.parametrize("target", ["cpu", "cuda", "hopper"])
def test_mass_one_is_the_source(source: Path, target: str, tmp_path: Path) -> None:
    whole = replace(SPARSE, mass=1.0)
    export_to(source, tmp_path / "out", layers=(2,), blocks=whole, target=target)
    roles = _roles(tmp_path / "out")
    assert roles == [LayerRole.BLOCK_SPARSE, LayerRole.BLOCK_SPARSE, LayerRole.TRIANGLE]
    ids = random_ids(1, TOKENS)
    expected = example_logits(odd_models.peaked(), ids, {2: SMALL})
    assert_close(Session.of(tmp_path / "out").logits(ids), expected)


def test_block_sparse_layers_need_no_triangle_layers(source: Path, tmp_path: Path) -> None:
    report = export_to(source, tmp_path / "out", layers=(), blocks=SPARSE, verify=True)
    assert [row.action for row in report.layers] == ["block-sparse", "block-sparse", "dense"]
    assert (report.pattern, report.layer_choice) == (None, "--layers none")
    ids = random_ids(1, TOKENS)
    expected = example_logits(odd_models.peaked(), ids, {0: RULE, 1: RULE})
    assert_close(Session.of(tmp_path / "out").logits(ids), expected)
    with pytest.raises(ExportError, match="no layer would become a triangle layer"):
        export_to(source, tmp_path / "out", layers=(), blocks=BlockRequest(), force=True)


def test_nodes_are_complete_and_the_folder_says_what_they_are(source: Path, tmp_path: Path) -> None:
    report = export_to(source, tmp_path / "out", layers=(2,), blocks=SPARSE)
    model = ir.load(tmp_path / "out" / "model.onnx")
    nodes = [node for node in AttentionNode.all_of(model.graph) if node.node.op_type == OP_TYPE]
    assert len(nodes) == 2
    for node in nodes:
        assert node.rule == RULE
        assert len(node.node.inputs) == len(contract.INPUTS)
        assert None not in node.node.inputs
        assert len(node.node.outputs) == len(contract.OUTPUTS)
    assert {x.name for x in model.functions.values()} == {OP_TYPE, "TriangleAttention"}
    assert [row.action for row in report.layers] == ["block-sparse", "block-sparse", "triangle"]
    assert [row.runs_as for row in report.layers] == [OP_TYPE, OP_TYPE, "TriangleAttention"]
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.block_sparse_layers, manifest.block_rule) == ((0, 1), RULE)
    content = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert (content["block_sparse_layers"], content["triangle_layers"]) == ([0, 1], [2])
    assert content["block_rule"]["mass"] == 0.6


def test_a_rotation_inside_stays_inside(tmp_path: Path) -> None:
    """On `hopper`, of a source that unpacks and rotates itself: such a model needs the library."""
    example = group_query_attention.PATTERN.example()
    path = save_example(example.model, tmp_path / "source")
    export_to(path, tmp_path / "out", layers=(2,), blocks=SPARSE, target="hopper")
    model = ir.load(tmp_path / "out" / "model.onnx")
    folded = [node.is_folded for node in AttentionNode.all_of(model.graph)]
    assert folded == [True] * 3
    assert not model.functions


@pytest.mark.parametrize("first", [{}, {"blocks": SPARSE}])
def test_an_export_is_exported_again(
    source: Path, first: dict[str, BlockRequest], tmp_path: Path
) -> None:
    export_to(source, tmp_path / "first", layers=(1,) if not first else (2,), **first)
    other = BlockRequest((0, 2), mass=0.5, min_length=0)
    export_to(tmp_path / "first", tmp_path / "again", layers=(1,), blocks=other)
    export_to(source, tmp_path / "direct", layers=(1,), blocks=other)
    assert Manifest.load(tmp_path / "again") == Manifest.load(tmp_path / "direct")
    ids = random_ids(1, TOKENS)
    again, direct = (Session.of(tmp_path / name).logits(ids) for name in ("again", "direct"))
    assert_close(again, direct)
    export_to(tmp_path / "first", tmp_path / "dense", dense=True)
    expected = example_logits(odd_models.peaked(), ids, {})
    assert_close(Session.of(tmp_path / "dense").logits(ids), expected)


def test_the_plan_that_is_used_brings_them(source: Path, tmp_path: Path) -> None:
    plan = LayerRequest(plan=_plan(tmp_path))
    report = export_to(source, tmp_path / "out", dry_run=True)
    assert not report.block_choice, "without that plan nothing is block-sparse"

    def roles(layers: LayerRequest, blocks: BlockRequest) -> list[str]:
        told = export_to(
            source, tmp_path / "out", dry_run=True, **{"layers": layers}, blocks=blocks
        )
        return [row.action for row in told.layers]

    sparse, triangle, dense = "block-sparse", "triangle", "dense"
    assert roles(plan, BlockRequest()) == [sparse, sparse, triangle]
    assert roles(plan, BlockRequest(())) == [dense, dense, triangle]
    assert roles(plan, BlockRequest((1,))) == [dense, sparse, triangle]
    more = replace(plan, count=2)
    assert roles(more, BlockRequest()).count(triangle) == 2
    assert roles(LayerRequest(layers=(2,)), BlockRequest()) == [dense, dense, triangle]


def test_the_gain_is_predicted_from_densities(source: Path, tmp_path: Path) -> None:
    plan = _plan(tmp_path, densities={4000: {0: 0.5, 1: 0.3}})
    options = {"layers": LayerRequest(plan=plan), "dry_run": True, "prompt_length": 4000}
    report = export_to(source, tmp_path / "out", **options)
    whole = export_to(source, tmp_path / "out", **options, blocks=BlockRequest(()))
    layer = report.cost.dense_flops // 3
    saved = whole.cost.triangle_flops - report.cost.triangle_flops
    assert saved == pytest.approx((2 - 0.5 - 0.3 - 2 / 32) * layer, rel=1e-6)
    assert not report.cost.not_predicted
    for blocks in (BlockRequest(mass=0.5), BlockRequest(min_length=5)):
        other = export_to(source, tmp_path / "out", **options, blocks=blocks)
        assert other.cost.not_predicted == (0, 1)
        assert other.cost.triangle_flops == whole.cost.triangle_flops
        assert any("layers 0-1 gain is not predicted" in note for note in other.notes)
    short = export_to(source, tmp_path / "out", **options, blocks=BlockRequest(min_length=4000))
    assert not short.cost.not_predicted, "up to min_length the layers are dense for certain"
    assert short.cost == whole.cost


@pytest.mark.parametrize(
    ("layers", "blocks", "message"),
    [
        ((2,), BlockRequest((3,)), r"names layer 3, but the model has 3 layers \(0-2\)"),
        ((2,), BlockRequest((1, 2)), "names layer 2, which is a triangle layer"),
        ((1,), BlockRequest((2,)), "names layer 2, which slides a window of its own"),
        ((1,), BlockRequest(mass=0.5), "of block-sparse layers, of which there are none"),
        ((1,), BlockRequest(min_length=9), "of block-sparse layers, of which there are none"),
    ],
)
def test_impossible_choices_are_refused(
    layers: tuple[int, ...], blocks: BlockRequest, message: str, tmp_path: Path
) -> None:
    windowed = layers == (1,)
    example = odd_models.every_second_windowed() if windowed else odd_models.peaked()
    path = save_example(example.model, tmp_path / "source")
    with pytest.raises(ExportError, match=message):
        export_to(path, tmp_path / "out", layers=layers, blocks=blocks)


def test_a_plans_layer_that_slides_a_window_keeps_it(tmp_path: Path) -> None:
    path = save_example(odd_models.every_second_windowed().model, tmp_path / "source")
    plan = _plan(tmp_path, layers=(0, 1))
    options = {"layers": LayerRequest(layers=None, plan=plan, count=1), "blocks": BlockRequest()}
    report = export_to(path, tmp_path / "out", **options, dry_run=True)
    assert [row.action for row in report.layers] == ["windowed", "triangle", "windowed"]
    assert any("layers 0-1 of the plan's block-sparse layers" in note for note in report.notes)


def test_ascend_keeps_them_dense_and_says_so(source: Path, tmp_path: Path) -> None:
    for blocks in (SPARSE, BlockRequest()):
        options = {"layers": LayerRequest(plan=_plan(tmp_path)), "blocks": blocks}
        report = export_to(source, tmp_path / "out", **options, target="ascend", dry_run=True)
        assert [row.action for row in report.layers] == ["dense", "dense", "triangle"]
        assert "ascend has no block-sparse attention: layers 0-1 stay dense" in report.notes


def test_on_the_command_line(
    source: Path, tmp_path: Path, monkeypatch: Patch, capsys: Captured
) -> None:
    command = [source, "-o", tmp_path / "out", "--layers", "2", "--block-sparse-layers", "0-1"]
    assert run_main(monkeypatch, *command, "--mass", "0.6", "--min-length", "0") == 0
    shown = capsys.readouterr().out
    assert "block-sparse layers chosen by: --block-sparse-layers" in shown
    assert "block-sparse layers 0-1: keep 60 % of the mass" in shown
    assert Manifest.load(tmp_path / "out").block_rule == RULE
    alone = ["--layers", "none", "--block-sparse-layers", "0-1", "--dry-run"]
    assert run_main(monkeypatch, source, *alone) == 0
    assert "layers chosen by: --layers none" in capsys.readouterr().out
    assert run_main(monkeypatch, tmp_path / "out", "--inspect") == 0
    assert capsys.readouterr().out.count("block-sparse 0.6 ") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dense", "--block-sparse-layers", "1"], "--dense has no block-sparse layers"),
        (["--dense", "--mass", "0.9"], "--dense has no block-sparse layers: leave --mass out"),
        (["--block-sparse-layers", "none", "--mass", "0.9"], "--mass has no effect"),
        (["--block-sparse-layers", "3-1"], "--block-sparse-layers: the range 3-1 runs backwards"),
        (["--mass", "0"], "--mass"),
        (["--mass", "1.5"], "--mass"),
    ],
)
def test_wrong_usage(
    options: list[str], message: str, source: Path, monkeypatch: Patch, capsys: Captured
) -> None:
    assert run_main(monkeypatch, source, "--dry-run", *options) == 2
    assert message in capsys.readouterr().err


def test_a_source_whose_choice_is_read_is_refused(tmp_path: Path) -> None:
    export_to(
        save_example(odd_models.peaked().model, tmp_path / "source"),
        tmp_path / "out", layers=(2,), blocks=SPARSE,
    )  # fmt: skip
    model = ir.load(tmp_path / "out" / "model.onnx")
    for node in (node.node for node in AttentionNode.all_of(model.graph)[:2]):
        node.resize_outputs(4)
        node.outputs[3].name, node.outputs[3].type = (
            f"{node.name}/mask",
            ir.TensorType(ir.DataType.UINT8),
        )
        model.graph.outputs.append(node.outputs[3])
    add_function(model, OP_TYPE)
    path = save_example(model, tmp_path / "reads")
    with pytest.raises(ExportError, match="its output block_mask is read"):
        export_to(path, tmp_path / "again", layers=(2,))


def test_a_folder_for_genai_names_the_library(tmp_path: Path) -> None:
    example = group_query_attention.PATTERN.example()
    path = save_example(example.model, tmp_path / "source")
    decoder = {"model": {"decoder": {"filename": "model.onnx"}}}
    (path.parent / "genai_config.json").write_text(json.dumps(decoder))
    export_to(path, tmp_path / "out", layers=(2,), blocks=SPARSE)
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    options = config["model"]["decoder"]["session_options"]
    assert (tmp_path / "out" / options["custom_ops_library"]).is_file()
