"""`--verify` of models that round activations to 8 bits: without the rounding, on both sides."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from onnxruntime.quantization import QuantType, quantize_dynamic
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.graph.attention_node import AttentionNode, LayerRole
from trianglemix.exporter.options import ExportOptions, LayerRequest, PatternRequest
from trianglemix.exporter.pipeline import export
from trianglemix.exporter.report.export_report import ExportReport
from trianglemix.exporter.verify.rounding import coarsest_type, unrounded_type
from trianglemix.exporter.verify.session import form_of

from tests.exporter.exports import Silent
from tests.exporter.verify.test_verify_far import PLAIN
from tests.odd.decoder import write_model

WINDOW = "sliding_window_size"


@pytest.fixture(scope="module", params=[QuantType.QInt8, QuantType.QUInt8], ids=["int8", "uint8"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A windowed decoder, its products quantised as ONNX Runtime does it."""
    folder = tmp_path_factory.mktemp("rounded")
    plain, path = folder / "plain.onnx", folder / "model.onnx"
    odd = replace(PLAIN, mask="less", size=90, window_layers=(0,))
    onnx.save(write_model(odd), plain)
    options = {"MatMulConstBOnly": True}
    quantize_dynamic(str(plain), str(path), weight_type=request.param, extra_options=options)
    return path


def verified(source: Path, folder: Path) -> ExportReport:
    options = ExportOptions(
        source, folder, layers=LayerRequest(layers=(1,)), pattern=PatternRequest(8, 64, 16),
        verify=True, verify_tokens=500,
    )  # fmt: skip
    return export(options, Silent())


def test_all_but_a_short_prompt_is_compared_without_rounding(source: Path, tmp_path: Path) -> None:
    assert coarsest_type(source, "float32") == "int8"
    assert unrounded_type(source, "float32") == "unrounded"
    report = verified(source, tmp_path / "out")
    rounded = [x for x in report.verification if x.name.endswith("activations rounded")]
    exact = [x for x in report.verification if x not in rounded]
    assert {x.tokens for x in rounded} == {154, 157}
    assert {x.tokens for x in exact} == {152, 154, 157, 497, 500}
    assert all(x.max_error < 0.1 * x.tolerance for x in exact)
    assert max(x.tolerance for x in exact) < 0.01 * min(x.tolerance for x in rounded)
    assert any("one row padded" in x.name for x in exact)  # its pads move no scale of the others
    assert [note for note in report.notes if "without that rounding" in note]
    products = {node.op_type for node in ir.load(tmp_path / "out" / "model.onnx").graph}
    assert "MatMulInteger" in products  # the export itself rounds as its source does


@pytest.mark.parametrize(
    ("dense", "attribute", "number"),
    [
        (True, WINDOW, 91),
        (True, "scale", 0.2525),
        (False, "num_sink_tokens", 0),
        (False, WINDOW, 65),
    ],
    ids=["window", "scale", "sink", "pattern"],
)
def test_small_faults_are_seen(
    dense: bool,
    attribute: str,
    number: float,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A window off by one, a scale by 1 %; in the body alone no sinks, or a wider window."""

    @contextmanager
    def faulty(path: Path, *, dense: Collection[LayerRole], canonical: bool) -> Iterator[Path]:
        with form_of(path, dense=dense, canonical=canonical) as form:
            model = ir.load(form)
            nothing_dropped = LayerRole.TRIANGLE in dense
            spoilt = nothing_dropped if by_dense else canonical and not nothing_dropped
            for layer, triangle in enumerate(AttentionNode.all_of(model.graph)):
                if spoilt and layer == (0 if by_dense else 1):
                    kind = ir.AttrInt64 if isinstance(number, int) else ir.AttrFloat32
                    triangle.node.attributes.add(kind(attribute, number))  # type: ignore[arg-type]
            copy = form.with_name("faulty.onnx")
            ir.save(model, copy)
            yield copy
            copy.unlink()

    by_dense = dense
    monkeypatch.setattr("trianglemix.exporter.verify.verify_export.form_of", faulty)
    with pytest.raises(ExportError, match="verification failed"):
        verified(source, tmp_path / "out")
