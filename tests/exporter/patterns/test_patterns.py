"""Every source pattern's example is found, exported, and keeps its numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.exporter.attention.sites import Pattern
from trianglemix.exporter.options import PatternRequest
from trianglemix.exporter.registry import all_patterns
from trianglemix.manifest.manifest import Manifest

from tests.exporter.example_oracle import example_logits
from tests.exporter.exports import Session, assert_close, export_to, random_ids, save_example

PATTERNS = all_patterns()
SMALL = TrianglePattern(2, 6, 3)
pytestmark = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)


def _source_session(path: Path, manifest: Manifest) -> Session:
    return Session(path, manifest)


def test_example_is_found_as_what_it_is(pattern: Pattern, tmp_path: Path) -> None:
    example = pattern.example()
    path = save_example(example.model, tmp_path / "source")
    report = export_to(path, tmp_path / "out", layers=(1,))
    assert [row.form for row in report.layers] == [pattern.name] * example.num_layers
    assert {row.mask for row in report.layers} == {"causal"}
    for row in report.layers:
        found = (row.num_heads, row.kv_num_heads, row.head_size, row.value_head_size)
        shape = example.shape
        assert found == (
            shape.num_heads,
            shape.kv_num_heads,
            shape.head_size,
            shape.value_head_size,
        )
        assert row.scale == pytest.approx(shape.head_size**-0.5, rel=1e-6)


def test_keeping_everything_gives_the_source(pattern: Pattern, tmp_path: Path) -> None:
    example = pattern.example()
    path = save_example(example.model, tmp_path / "source")
    export_to(path, tmp_path / "out", layers=(0, 1, 2), pattern=PatternRequest(4, 64, 8))
    for kernel in (True, False):
        ours = Session.of(tmp_path / "out", kernel=kernel)
        theirs = _source_session(path, ours.manifest)
        ids = random_ids(1, 40)
        ours_first, theirs_first = ours.run(ids[:, :30]), theirs.run(ids[:, :30])
        assert_close(ours_first["logits"], theirs_first["logits"])
        mask = np.ones((1, 40), np.int64)
        ours_next = ours.run(ids[:, 30:], mask, past=ours.carried(ours_first))
        theirs_next = theirs.run(ids[:, 30:], mask, past=theirs.carried(theirs_first))
        assert_close(ours_next["logits"], theirs_next["logits"])
        for name, expected in theirs_next.items():
            assert_close(ours_next[name], expected)


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "function"])
def test_small_window_equals_masked_model(pattern: Pattern, kernel: bool, tmp_path: Path) -> None:
    example = pattern.example()
    path = save_example(example.model, tmp_path / "source")
    export_to(path, tmp_path / "out", layers=(0, 2))
    ids = random_ids(2, 33)
    patterns = {0: SMALL, 2: SMALL}
    rotates = pattern.name == "group_query_attention"
    expected = example_logits(example, ids, patterns, rotates=rotates)
    assert_close(Session.of(tmp_path / "out", kernel=kernel).logits(ids), expected)
    dense = example_logits(example, ids, {}, rotates=rotates)
    assert np.abs(dense - expected).max() > 1e-2, "the pattern dropped nothing: no test at all"


def test_chunks_with_prompt_length_equal_one_pass(pattern: Pattern, tmp_path: Path) -> None:
    path = save_example(pattern.example().model, tmp_path / "source")
    export_to(path, tmp_path / "out", layers=(0, 1, 2))
    session = Session.of(tmp_path / "out")
    ids = random_ids(2, 41)
    whole = session.logits(ids)
    past, parts = session.empty_cache(2), []
    for start, end in ((0, 17), (17, 30), (30, 41)):
        mask = np.ones((2, end), np.int64)
        outputs = session.run(ids[:, start:end], mask, past, prompt_length=[41, 41])
        parts.append(outputs["logits"])
        past = session.carried(outputs)
    assert_close(np.concatenate(parts, axis=1), whole)


def test_exports_twice_to_the_same_bytes(pattern: Pattern, tmp_path: Path) -> None:
    path = save_example(pattern.example().model, tmp_path / "source")
    before = path.read_bytes()
    for name in ("a", "b"):
        export_to(path, tmp_path / name, layers=(1,))
    for name in ("model.onnx", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert path.read_bytes() == before


def test_opset_and_ir_version_stay(pattern: Pattern, tmp_path: Path) -> None:
    path = save_example(pattern.example().model, tmp_path / "source")
    export_to(path, tmp_path / "out", layers=(1,))
    source, exported = ir.load(path), ir.load(tmp_path / "out" / "model.onnx")
    assert exported.ir_version == source.ir_version
    assert exported.graph.opset_imports[""] == source.graph.opset_imports[""]
    names = [value.name for value in source.graph.outputs]
    assert [value.name for value in exported.graph.outputs] == names
