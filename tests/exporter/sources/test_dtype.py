"""`--dtype` says what the weights of a Hugging Face folder become, for every target."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.options import Dtype, ExportOptions, LayerRequest
from trianglemix.exporter.patterns.softmax import PATTERN
from trianglemix.exporter.pipeline import export
from trianglemix.exporter.registry import all_targets
from trianglemix.manifest.manifest import Manifest

from tests.exporter.exports import SMALL, Silent, save_example
from tests.exporter.sources.huggingface_folders import save_bfloat16

LAYERS = LayerRequest(layers=(1,))


@pytest.fixture(scope="module")
def brain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a bfloat16 folder."""
    return save_bfloat16("llama", tmp_path_factory.mktemp("brain"))


@pytest.mark.parametrize(
    ("target", "dtype", "becomes"),
    [("cpu", "float16", "float16"), ("cpu", "auto", "float32"), ("cuda", "float16", "float16"),
     ("cuda", "auto", "bfloat16")],
)  # fmt: skip
def test_a_folder_becomes_what_was_asked_for(
    brain_folder: Path, target: str, dtype: Dtype, becomes: str, tmp_path: Path
) -> None:
    options = ExportOptions(
        brain_folder, tmp_path / "out", target=target, layers=LAYERS, pattern=SMALL, dtype=dtype,
        verify=becomes != "bfloat16",  # which the CPU does not compute
    )  # fmt: skip
    report = export(options, Silent())
    assert all(check.passed for check in report.verification)
    assert Manifest.load(tmp_path / "out").cache_dtype == becomes
    weights = ir.load(tmp_path / "out" / "model.onnx").graph.initializers
    types = {value.dtype for name, value in weights.items() if name.endswith("weight")}
    names = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}
    assert types == {ir.DataType[names[becomes]]}


@pytest.mark.parametrize("target", sorted(all_targets()))
def test_a_file_keeps_its_types(target: str, tmp_path: Path) -> None:
    source = save_example(PATTERN.example().model, tmp_path / "source")
    options = ExportOptions(source, tmp_path / "out", target=target, layers=LAYERS, dtype="float16")
    with pytest.raises(ExportError, match="--dtype float16 is for a Hugging Face folder"):
        export(options, Silent())
    assert not (tmp_path / "out").exists()
