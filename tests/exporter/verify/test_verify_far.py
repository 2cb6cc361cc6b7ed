"""`--verify` sees what a probe that sees nothing would let through, and alarms nobody else."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper
from trianglemix.custom_ops.arrays import Array
from trianglemix.exporter.attention.sites import MaskClass
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.options import ExportOptions, LayerRequest, PatternRequest
from trianglemix.exporter.pipeline import export
from trianglemix.exporter.report.export_report import ExportReport
from trianglemix.exporter.sources.companions import Companions
from trianglemix.exporter.sources.model_config import special_ids
from trianglemix.exporter.verify.session import OpenModel, open_model
from trianglemix.manifest.manifest import Manifest

from tests.exporter.exports import SMALL, Silent
from tests.odd.decoder import write_model
from tests.odd.odd_model import OddModel
from tests.odd.scales import TABLE
from tests.odd.trial import store

PLAIN = OddModel(
    seed=7, mask="causal", size=90, scale="times", window_layers=(0, 1), num_layers=2,
    spelling="softmax", repeat="expand", kv_heads=2, opset=18, dtype="float32",
    mask_form="where", cache="BHTD", cache_dtype="float32", ids_dtype="int64",
    mask_dtype="int64", positions="rank2", batch="batch", present="joined", extra="nothing",
    attribute="none", storage="inside", branches=False, shares=False, shapes=True, shuffled=False,
)  # fmt: skip


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that takes every mask for causal, every scale for a number, and any result."""
    where = "trianglemix.exporter.patterns"
    monkeypatch.setattr(f"{where}._softmax_rows.measure_class", lambda *_: MaskClass(None))
    monkeypatch.setattr(f"{where}._softmax_measure._check_factors", lambda *_: None)
    for name in ("TOLERANCE", "_LOUD_TOLERANCE"):
        monkeypatch.setattr(f"{where}._softmax_measure.{name}", 1e9)


def verified(model: OddModel, folder: Path, **options: object) -> ExportReport:
    path = folder / "source" / "model.onnx"
    path.parent.mkdir()
    store(write_model(model), path, "inside")
    settings = {"layers": LayerRequest(layers=(1,)), "pattern": SMALL, "verify": True, **options}
    return export(ExportOptions(path, folder / "out", **settings), Silent())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mask", "scale", "cache", "size"),
    [
        ("bool_buffer", "times", "BHTD", 500),
        ("float_buffer", "times", "BHTD", 300),
        ("floats", "times", "BHTD", 1900),
        ("power", "times", "BHTD", 1024),
        ("chunk", "times", "BTHD", 700),
        ("beyond_length", "times", "BHTD", 1200),
        ("document", "times", "none", 17),
        ("hidden_token", "times", "none", 80),
        ("causal", "log_of_total", "BHTD", 1000),
        ("causal", "clipped", "BHTD", 900),
        ("causal", "far_bias", "BHTD", 1500),
    ],
)
def test_what_a_blind_probe_lets_through_fails(
    blind: None, mask: str, scale: str, cache: str, size: int, tmp_path: Path
) -> None:
    model = replace(PLAIN, mask=mask, scale=scale, cache=cache, size=size)
    with pytest.raises(ExportError, match="verification failed"):
        verified(model, tmp_path)
    assert not (tmp_path / "out").exists()


def test_how_far_is_compared_is_what_was_asked(blind: None, tmp_path: Path) -> None:
    """A window of 300 shows beyond 300 tokens, and not before."""
    model = replace(PLAIN, mask="less", size=300)
    report = verified(model, tmp_path, verify_tokens=280)
    assert max(check.tokens for check in report.verification) == 280
    with pytest.raises(ExportError, match=r"verification failed: long prompt in chunks \(307 tok"):
        export(
            ExportOptions(
                tmp_path / "source" / "model.onnx",
                tmp_path / "far",
                verify=True,
                pattern=SMALL,
                layers=LayerRequest(layers=(1,)),
                verify_tokens=310,
            ),
            Silent(),
        )


@pytest.mark.parametrize(
    "model",
    [
        PLAIN,
        replace(PLAIN, mask="less", size=300, window_layers=(0,)),
        replace(PLAIN, batch=1),
        replace(PLAIN, cache="none"),
        replace(PLAIN, dtype="float16", cache_dtype="float16"),
        replace(PLAIN, extra="last_row"),
        replace(PLAIN, spelling="group_query", repeat="inside"),
        replace(PLAIN, mask="float_buffer", size=300, window_layers=(0,)),
    ],
    ids=["plain", "window", "batch_1", "no_cache", "half", "last_row", "group_query", "table"],
)
def test_right_exports_pass_as_far_as_the_source_runs(model: OddModel, tmp_path: Path) -> None:
    report = verified(model, tmp_path)
    assert all(check.passed for check in report.verification)
    far = max(check.tokens for check in report.verification)
    buffered = model.mask == "float_buffer"
    assert far == (1024 if buffered else 2048)
    notes = " ".join(report.notes)
    assert ("longer texts are refused" in notes) == (buffered or model.cache == "none")
    assert f"of up to {far} tokens" in notes
    assert sorted(path.name for path in (tmp_path / "out").glob("*.onnx")) == ["model.onnx"]


def test_a_window_that_was_not_passed_is_told(tmp_path: Path) -> None:
    model = replace(PLAIN, mask="less", size=3000, window_layers=(0,))
    report = verified(model, tmp_path)
    assert [x for x in report.notes if "source's window of 3000; --verify-tokens 3064" in x]


def test_a_source_that_does_not_run_is_said_to_be_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: OpenModel, feeds: dict[str, Array]) -> dict[str, Array]:
        raise ExportError("verification: the model does not run: out of data bounds")

    monkeypatch.setattr(OpenModel, "run", failing)
    with pytest.raises(ExportError, match="the source itself does not run: out of data bounds"):
        verified(PLAIN, tmp_path)


def test_a_kernel_that_reads_chunks_otherwise_is_given_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GroupQueryAttention's of some versions: only what it reads alike is compared."""
    model = replace(PLAIN, spelling="group_query", repeat="inside")
    run = OpenModel.run

    def otherwise(self: OpenModel, feeds: dict[str, Array]) -> dict[str, Array]:
        outputs = run(self, feeds)
        length, total = feeds["input_ids"].shape[1], feeds["attention_mask"].shape[1]
        if 1 < length < total:
            outputs["logits"] = outputs["logits"] * 1.5
        return outputs

    names = [check.name for check in verified(model, tmp_path).verification]
    assert "long prompt in chunks" in names
    monkeypatch.setattr(OpenModel, "run", otherwise)
    (tmp_path / "other").mkdir()
    names = [check.name for check in verified(model, tmp_path / "other").verification]
    assert "long prompt in chunks" not in names
    assert "long prompt" in names


def test_one_model_is_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of gigabytes are in memory once."""
    opened: list[weakref.ref[OpenModel]] = []

    def counted(
        path: Path, manifest: Manifest, library: Path | None, provider: str, *, unrounded: bool
    ) -> OpenModel:
        assert not [model for model in opened if model() is not None]
        model = open_model(path, manifest, library, provider, unrounded=unrounded)
        opened.append(weakref.ref(model))
        return model

    monkeypatch.setattr("trianglemix.exporter.verify.verify_export.open_model", counted)
    verified(PLAIN, tmp_path, verify_tokens=200)
    assert len(opened) == 4  # source, dense form, kernel, function body


def test_special_ids_of_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"eos_token_id": [5, 6], "pad_token_id": null, "text_config": {"bos_token_id": 2}}'
    )
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert special_ids(Companions((tmp_path,))) == (2, 5, 6, 9)


def _with_short_tables(path: Path, rows: int) -> None:
    """Tables of positions that end there."""
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.dims and tensor.dims[0] == TABLE:
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor)[:rows], tensor.name)
            )
    onnx.save(proto, path)


@pytest.mark.parametrize(
    "choices",
    [{}, {"positions": "slots"}, {"positions": "rank1"}, {"positions": "rank3"},
     {"positions": "none", "extra": "cache_position"}],
    ids=["rank2", "slots", "rank1", "rank3", "learned"],
)  # fmt: skip
def test_nothing_is_read_beyond_tables_of_positions(
    choices: dict[str, Any], tmp_path: Path
) -> None:
    """Neither beside the source nor to see keys dropped, which here begins beyond the tables."""
    path = tmp_path / "source" / "model.onnx"
    path.parent.mkdir()
    store(write_model(replace(PLAIN, **choices)), path, "inside")
    _with_short_tables(path, 300)
    for name, pattern, tokens in (
        ("far", PatternRequest(8, 300, 90), 280),
        ("near", PatternRequest(8, 200, 90), 2048),
    ):
        options = ExportOptions(
            path, tmp_path / name, layers=LayerRequest(layers=(1,)), pattern=pattern,
            verify=True, verify_tokens=tokens,
        )  # fmt: skip
        report = export(options, Silent())
        notes = " ".join(report.notes)
        assert max(check.tokens for check in report.verification) == min(tokens, 300)
        assert "the source's tables of positions end at 300 tokens" in notes
        assert ("kernel and function body were not compared" in notes) == (name == "far")


def test_which_part_of_the_vocabulary_was_compared_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trianglemix.exporter.verify.text_reading._KEPT", 1 << 14)
    notes = verified(PLAIN, tmp_path, verify_tokens=470).notes
    assert [
        x
        for x in notes
        if "of the vocabulary's 83, every 2nd logit at 157 tokens, every 3rd logit at 470" in x
    ]
    (tmp_path / "whole").mkdir()
    monkeypatch.undo()
    notes = verified(PLAIN, tmp_path / "whole", verify_tokens=470).notes
    assert not [x for x in notes if "of the vocabulary's" in x]
