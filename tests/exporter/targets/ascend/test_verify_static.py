"""`--verify`, `--last-token-logits` and `--dtype` of the target ascend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from trianglemix.exporter.errors import ExportError, RefusedError
from trianglemix.exporter.options import ExportOptions, LayerRequest
from trianglemix.exporter.pipeline import export
from trianglemix.exporter.report.export_report import ExportReport
from trianglemix.exporter.targets.ascend import verify_static
from trianglemix.exporter.targets.ascend.lint import has_errors, lint_file
from trianglemix.exporter.targets.ascend.options import AscendRequest
from trianglemix.exporter.targets.ascend.soc import find_soc
from trianglemix.manifest.manifest import Manifest
from trianglemix.manifest.static_graphs import Lowering

from tests.exporter.exports import save_example
from tests.exporter.sources.huggingface_folders import save_bfloat16
from tests.exporter.targets.ascend.exported import (
    CHUNK,
    PATTERN,
    SLOTS,
    TRIANGLE,
    Silent,
    tiny_source,
)
from tests.exporter.targets.ascend.half_model import save_half
from tests.exporter.test_half_precision import half_example

_NAMES = [
    "prompt in the tail",
    "prompt in chunks and the tail",
    "decode step",
    "long prompt against the operator's kernel",
]


def verified(
    source: Path, output: Path, lowering: Lowering = "block", dense: bool = False
) -> ExportReport:
    options = ExportOptions(
        source,
        output,
        target="ascend",
        layers=LayerRequest() if dense else TRIANGLE,
        pattern=PATTERN,
        dense=dense,
        verify=True,
        last_token_logits=True,
        settings=AscendRequest("Ascend910B3", CHUNK, SLOTS, None, lowering),
    )
    return export(options, Silent())


@pytest.mark.parametrize("lowering", ["block", "custom"])
def test_verify_compares_source_and_kernel(lowering: Lowering, tmp_path: Path) -> None:
    source = save_half(tiny_source(), tmp_path / "half" / "model.onnx")
    report = verified(source, tmp_path / "out", lowering)
    assert [check.name for check in report.verification] == _NAMES
    assert [check.tokens for check in report.verification] == [16, 44, 45, 112]
    assert all(check.passed for check in report.verification)
    assert any("--last-token-logits changes nothing" in note for note in report.notes)
    assert Manifest.load(tmp_path / "out").last_token_logits
    assert not (tmp_path / "out" / ".work").exists()


def test_the_dense_twin_has_no_kernel_to_be_compared_with(tmp_path: Path) -> None:
    report = verified(tiny_source("qwen3", "dynamo-sdpa-20"), tmp_path / "out", dense=True)
    assert [check.name for check in report.verification] == _NAMES[:3]


def test_a_source_that_drops_keys_itself_is_compared_below_that(tmp_path: Path) -> None:
    first = tmp_path / "first"
    export(ExportOptions(tiny_source(), first, layers=TRIANGLE, pattern=PATTERN), Silent())
    report = verified(first / "model.onnx", tmp_path / "out", dense=True)
    assert [check.tokens for check in report.verification] == [44, 45]
    assert any("up to 44 tokens" in note for note in report.notes)


@pytest.mark.parametrize("name", _NAMES)
def test_every_comparison_can_fail(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of one kind of call are spoiled; nothing is left behind."""
    read, calls = verify_static._StaticModel.read, iter(_NAMES)

    def spoiled(self: object, *arguments: object, **named: object) -> dict[str, np.ndarray]:
        logits = read(self, *arguments, **named)  # type: ignore[arg-type]
        factor = 2.0 if next(calls) == name else 1.0
        return {key: array * factor for key, array in logits.items()}

    monkeypatch.setattr(verify_static._StaticModel, "read", spoiled)
    with pytest.raises(ExportError, match=rf"verification failed: {name}"):
        verified(tiny_source("qwen3"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_is_not_stored_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_static._StaticModel, "_store", lambda *_: None)
    with pytest.raises(ExportError, match="verification failed: prompt in chunks and the tail"):
        verified(tiny_source("qwen3"), tmp_path / "out")


def test_a_source_that_keeps_the_last_logits_only(tmp_path: Path) -> None:
    options = ExportOptions(
        tiny_source(), tmp_path / "cpu", layers=TRIANGLE, last_token_logits=True
    )
    export(options, Silent())
    with pytest.raises(ExportError, match="keeps the last token's logits only, by the attention"):
        verified(tmp_path / "cpu" / "model.onnx", tmp_path / "out")


@pytest.fixture(scope="module")
def brain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a bfloat16 folder."""
    return save_bfloat16("llama", tmp_path_factory.mktemp("brain"))


def export_folder(source: Path, output: Path, dtype: str, soc: str) -> None:
    request = AscendRequest(soc, CHUNK, SLOTS)
    options = ExportOptions(
        source, output, target="ascend", layers=TRIANGLE, pattern=PATTERN, verify=True,
        settings=request, dtype=dtype,  # type: ignore[arg-type]
    )  # fmt: skip
    export(options, Silent())


def test_bfloat16_folder_in_float16_for_a_chip_without(brain_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="bfloat16, which Ascend310P3 does not have; add --dtype"):
        export_folder(brain_folder, tmp_path / "out", "auto", "Ascend310P3")
    export_folder(brain_folder, tmp_path / "out", "float16", "Ascend310P3")
    assert Manifest.load(tmp_path / "out").cache_dtype == "float16"
    for file in (tmp_path / "out").glob("*.onnx"):
        assert not has_errors(lint_file(file, find_soc("Ascend310P3")))
        types = {tensor.data_type for tensor in onnx.load(file).graph.initializer}
        assert onnx.TensorProto.BFLOAT16 not in types


def test_a_weight_that_float16_cannot_hold_is_named(brain_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(brain_folder, dtype="bfloat16")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = 70000.0
    model.save_pretrained(tmp_path / "large")
    message = r"weight model\.layers\.1\.mlp\.up_proj\.weight holds numbers beyond 65504"
    with pytest.raises(RefusedError, match=message):
        export_folder(tmp_path / "large", tmp_path / "out", "float16", "Ascend310P3")
    assert not (tmp_path / "out").exists()


def test_bfloat16_graphs_cannot_be_verified_here(tmp_path: Path) -> None:
    source = save_example(half_example(ir.DataType.BFLOAT16), tmp_path / "source")
    options = ExportOptions(
        source, tmp_path / "out", target="ascend", layers=LayerRequest(layers=(1,)),
        pattern=PATTERN, verify=True, settings=AscendRequest(chunk=CHUNK, max_length=SLOTS),
    )  # fmt: skip
    with pytest.raises(ExportError, match="computes nothing in bfloat16; leave --verify out"):
        export(options, Silent())
