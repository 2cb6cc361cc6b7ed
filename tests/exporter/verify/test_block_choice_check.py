"""`--verify` of block-sparse layers: mass 1 beside the source, the choice, the kernel's output."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import pytest
from trianglemix.custom_ops.block_sparse.reference import BlockSparse
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.graph.attention_node import AttentionNode, LayerRole
from trianglemix.exporter.options import BlockRequest
from trianglemix.exporter.patterns import group_query_attention
from trianglemix.exporter.verify import block_choice_check, session
from trianglemix.exporter.verify.verify_export import _Job

from tests.exporter import odd_models
from tests.exporter.exports import export_to, save_example
from tests.tiny_models import tiny_model

SPARSE: Final = BlockRequest((0, 1), mass=0.6)
CHECKS: Final = [
    "choice of blocks in layers 0, 1",
    "block-sparse layers 0, 1, kernel against function body",
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_example(odd_models.peaked().model, tmp_path / "source")


@pytest.mark.parametrize("route", ["dynamo-sdpa-20", "gqa"])
@pytest.mark.parametrize("target", ["cpu", "cuda", "hopper"])
def test_a_right_export_passes(route: str, target: str, tmp_path: Path) -> None:
    model = tiny_model("llama", route)
    report = export_to(
        model.path, tmp_path / "out", layers=(2,), blocks=SPARSE, target=target, verify=True
    )
    assert [check.name for check in report.verification][-2:] == CHECKS
    tokens = report.verification[-1].tokens
    assert tokens > 640, "no tile chooses in a shorter prompt"
    assert not list((tmp_path / "out").glob("verified*"))


def test_what_cannot_be_read_is_said(source: Path, tmp_path: Path) -> None:
    """A context of 600 tokens is over before any tile chooses."""
    (source.parent / "config.json").write_text('{"max_position_embeddings": 600}')
    report = export_to(source, tmp_path / "out", layers=(2,), blocks=SPARSE, verify=True)
    assert [note for note in report.notes if "choose nothing up to 639 tokens" in note]


@pytest.mark.parametrize(
    ("name", "value"), [("mass", 0.4), ("mass", 0.6), ("scale", 0.2525), ("softcap", 2.0)]
)
def test_faults_of_the_kernel_are_seen(
    name: str, value: float, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model that is run has another attribute than the file that was written."""

    def faulty(self: Any, path: Path, *arguments: Any, **named: Any) -> Any:
        model = ir.load(path)
        if path.name == "verified_blocks.onnx":
            AttentionNode.all_of(model.graph)[0].node.attributes.add(ir.AttrFloat32(name, value))
            ir.save(model, path)
        return opened(self, path, *arguments, **named)

    opened = _Job._open
    monkeypatch.setattr(_Job, "_open", faulty)
    with pytest.raises(ExportError, match=r"(choice of blocks|kernel against function body)"):
        export_to(source, tmp_path / "out", layers=(2,), blocks=SPARSE, verify=True)


def test_a_layer_that_is_not_dense_at_mass_one_is_seen(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense form of the export beside its source, where the rule still drops something."""
    right = session._drops_nothing

    def wrong(node: AttentionNode) -> ir.Attr:
        return ir.AttrFloat32("mass", 0.5) if node.role is LayerRole.BLOCK_SPARSE else right(node)

    monkeypatch.setattr(session, "_drops_nothing", wrong)
    blocks = BlockRequest((0, 2), mass=0.6, min_length=0)
    with pytest.raises(ExportError, match="long prompt"):
        export_to(
            source, tmp_path / "out", layers=(1,), blocks=blocks, verify=True, verify_tokens=900
        )


def test_heads_that_choose_otherwise_are_held_to_the_reference(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the body chose other blocks than the kernel, the output is still compared."""
    run = block_choice_check.run_body

    def otherwise(call: Any, attention: BlockSparse) -> Any:
        output, blocks = run(call, attention)
        return output * 0, ~blocks

    monkeypatch.setattr(block_choice_check, "run_body", otherwise)
    report = export_to(source, tmp_path / "out", layers=(2,), blocks=SPARSE, verify=True)
    assert [check.name for check in report.verification][-2:] == CHECKS


def test_packed_rotating_layers_are_looked_at_too(tmp_path: Path) -> None:
    example = group_query_attention.PATTERN.example()
    path = save_example(example.model, tmp_path / "source")
    report = export_to(
        path, tmp_path / "out", layers=(2,), blocks=SPARSE, target="hopper", verify=True
    )
    assert [check.name for check in report.verification][-2:] == CHECKS
