"""Last-token logits are the row that the full logits have at each row's last real token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.patterns.softmax import PATTERN
from trianglemix.manifest.manifest import Manifest

from tests.end_to_end.odd_interfaces import Interface, transposed_logits
from tests.exporter.exports import Session, assert_close, export_to, random_ids, save_example
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module", params=["dynamo-sdpa-20", "torchscript-18", "gqa"])
def folders(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("last")
    model = tiny_model("qwen2", request.param)
    export_to(model.path, root / "all", layers=(1,))
    export_to(model.path, root / "last", layers=(1,), last_token_logits=True)
    return root / "all", root / "last"


def test_each_row_gives_its_last_real_token(folders: tuple[Path, Path]) -> None:
    whole, last = (Session.of(folder) for folder in folders)
    ids = random_ids(3, 30, 256)
    mask = np.ones_like(ids)
    mask[1, 22:] = 0
    mask[2, 1:] = 0
    full = whole.logits(ids, mask)
    picked = full[np.arange(3), [29, 21, 0]][:, None]
    assert_close(last.logits(ids, mask), picked)


def test_chunks_and_decode_steps(folders: tuple[Path, Path]) -> None:
    whole, last = (Session.of(folder) for folder in folders)
    ids = random_ids(2, 31, 256)
    caches = [session.empty_cache(2) for session in (whole, last)]
    for start, end in ((0, 14), (14, 30), (30, 31)):
        mask = np.ones((2, end), np.int64)
        results = [
            session.run(ids[:, start:end], mask, cache)
            for session, cache in zip((whole, last), caches, strict=True)
        ]
        assert_close(results[1]["logits"], results[0]["logits"][:, -1:])
        caches = [
            session.carried(result) for session, result in zip((whole, last), results, strict=True)
        ]


def test_manifest_and_report_say_so(folders: tuple[Path, Path], tmp_path: Path) -> None:
    assert [Manifest.load(folder).last_token_logits for folder in folders] == [False, True]
    model = tiny_model("qwen2", "dynamo-sdpa-20")
    report = export_to(
        model.path, tmp_path / "x", layers=(1,), last_token_logits=True, prompt_length=1001
    )
    assert report.last_token is not None
    assert report.last_token.logits_bytes == 1000 * model.vocab_size * 4
    assert report.last_token.head_flops == 2 * 1000 * model.vocab_size * 48
    behind = 64 * 48 + 3 * 48 * 80  # the output projection and the MLP of the last layer
    assert report.last_token.tail_flops == 2 * 1000 * behind


def test_everything_behind_the_last_attention_runs_on_one_row(tmp_path: Path) -> None:
    model = tiny_model("llama", "dynamo-sdpa-20")
    export_to(model.path, tmp_path / "out", layers=(1,), last_token_logits=True)
    graph = ir.load(tmp_path / "out" / "model.onnx").graph
    last = [node for node in graph if node.op_type == "TriangleAttention"][-1]
    gathers = [node for node in graph if node.op_type == "GatherND"]
    assert len(gathers) == 2, "the attention's output and the residual stream"
    guard = next(node for node in last.outputs[0].consumers() if node.op_type == "Where")
    readers = {node.op_type for node in last.outputs[0].consumers()}
    assert readers == {"Where", "CastLike"}, "something reads all rows of the last attention"
    assert [node.op_type for node in guard.outputs[0].consumers()] == ["GatherND"]


def test_a_tail_that_is_not_plain_is_left_alone(tmp_path: Path) -> None:
    """Tokens mixed behind the last attention: the head alone sees one row."""
    example = PATTERN.example()
    graph = example.model.graph
    head = graph.outputs[0].producer()
    assert head is not None
    build = GraphBuilder(graph, "mixed")
    hidden = head.inputs[0]
    assert hidden is not None
    mean = build.op("ReduceMean", hidden, build.ints(1), keepdims=1)
    head.replace_input_with(0, build.op("Add", hidden, mean))
    graph.insert_before(head, build.nodes)
    path = save_example(example.model, tmp_path / "source")
    export_to(path, tmp_path / "all", layers=(1,))
    report = export_to(path, tmp_path / "last", layers=(1,), last_token_logits=True)
    assert report.last_token is not None
    assert report.last_token.tail_flops == 0
    ids = random_ids(2, 30)
    full, last = (Session.of(tmp_path / name).logits(ids) for name in ("all", "last"))
    assert_close(last, full[:, -1:])


@pytest.mark.parametrize(("extra", "kept"), [("last_row", None), ("keep_logits", 0),
                                             ("keep_logits", 1), ("keep_logits", 3)])  # fmt: skip
def test_a_source_that_keeps_its_last_rows_itself(
    extra: str, kept: int | None, tmp_path: Path
) -> None:
    path = Interface({"extra": extra}).write(tmp_path / "source" / "model.onnx")
    export_to(path, tmp_path / "all", layers=(1,))
    export_to(path, tmp_path / "last", layers=(1,), last_token_logits=True)
    for length in (1, 5, 20):
        ids, mask = random_ids(2, length, 83), np.ones((2, length), np.int64)
        results = []
        for session in (Session.of(tmp_path / name) for name in ("all", "last")):
            more = {} if kept is None else {"num_logits_to_keep": np.array(kept)}
            results.append(session.run(ids, mask, session.empty_cache(2) | more)["logits"])
        assert_close(results[1], results[0][:, -1:])


def test_logits_without_rows_are_refused(tmp_path: Path) -> None:
    path = Interface({}, transposed_logits).write(tmp_path / "source" / "model.onnx")
    with pytest.raises(RefusedError, match="leave --last-token-logits out"):
        export_to(path, tmp_path / "last", layers=(1,), last_token_logits=True)


def test_a_head_of_flat_rows_is_refused(tmp_path: Path) -> None:
    """Its Reshape counts all the rows of the prompt again, and there would be one."""
    example = PATTERN.example()
    graph = example.model.graph
    head = graph.outputs[0].producer()
    assert head is not None
    (hidden, weight), ids = head.inputs, next(x for x in graph.inputs if x.name == "input_ids")
    assert hidden is not None
    assert weight is not None
    assert weight.const_value is not None
    width, vocabulary = (int(size) for size in weight.const_value.shape.numpy())
    before, after = GraphBuilder(graph, "flat"), GraphBuilder(graph, "rows")
    head.replace_input_with(0, before.op("Reshape", hidden, before.ints(-1, width)))
    sizes = after.op("Concat", after.op("Shape", ids), after.ints(vocabulary), axis=0)
    logits = after.op("Reshape", head.outputs[0], sizes)
    graph.insert_before(head, before.nodes)
    graph.insert_after(head, after.nodes)
    logits.type, logits.shape = graph.outputs[0].type, graph.outputs[0].shape
    head.outputs[0].name, logits.name = "flat_logits", "logits"
    head.outputs[0].shape = None
    graph.outputs[0] = logits
    path = save_example(example.model, tmp_path / "source")
    export_to(path, tmp_path / "all", layers=(1,))
    with pytest.raises(RefusedError, match="leave --last-token-logits out"):
        export_to(path, tmp_path / "last", layers=(1,), last_token_logits=True)
