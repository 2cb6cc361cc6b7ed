"""Four ways to run one model with one plan give the same logits, and so the same tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from trianglemix.custom_ops import library
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.library import LibraryNotFoundError
from trianglemix.exporter.options import BlockRequest, ExportOptions, LayerRequest, PatternRequest
from trianglemix.exporter.pipeline import export
from trianglemix.pytorch import TriangleMixConfig, patch
from trianglemix.pytorch.kept_shares import KeptShares
from trianglemix.runtime.backends import ort
from trianglemix.runtime.session import TriangleSession

from tests.end_to_end.test_tiny_llm import SilentObserver
from tests.exporter.targets.ascend.exported import (
    CHUNK,
    LAST,
    Pair,
    export_pair,
    last_logits,
    prompt,
)
from tests.tiny_models import tiny_folder, tiny_model

CONFIG = TriangleMixConfig(4, 24, LAST, triangle_layer_indices=(1, 2))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A tiny Llama, exported for the CPU and for Ascend."""
    return export_pair(tiny_model("llama").path, tmp_path_factory.mktemp("routes"))


def _pytorch(ids: list[int], config: TriangleMixConfig | None = CONFIG) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), dtype=torch.float32).eval()
    if config:
        patch(model, config)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].numpy()


def _without_library(folder: Path, ids: list[int]) -> np.ndarray:
    def missing() -> Path:
        raise LibraryNotFoundError(f"{library.LIBRARY_NAME} is not in this installation")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ort, "library_path", missing)
        session = TriangleSession.from_folder(folder, provider="cpu", allow_fallback=True)
        assert session.kernel == "fallback"
        return np.asarray(last_logits(session, ids))[0]


@pytest.mark.parametrize("length", [150, 201])
def test_all_routes_give_the_same_logits(pair: Pair, length: int) -> None:
    ids = prompt(length)
    expected = _pytorch(ids)
    native = TriangleSession.from_folder(pair.cpu, provider="cpu")
    assert native.kernel == "native"
    routes = {
        "ONNX with the library": np.asarray(last_logits(native, ids))[0],
        "ONNX function": _without_library(pair.cpu, ids),
        "Ascend block form": np.asarray(
            last_logits(TriangleSession.from_folder(pair.ascend), ids, CHUNK)
        )[0],
    }
    for name, logits in routes.items():
        error = np.abs(logits - expected).max()
        assert error <= 2e-4 * max(1.0, np.abs(expected).max()), f"{name} is off by {error}"
    assert np.abs(_pytorch(ids, None) - expected).max() > 1e-2


@pytest.mark.parametrize("length", [1152, 1500])
def test_block_sparse_layers_are_the_same_by_every_route(tmp_path: Path, length: int) -> None:
    rule = BlockRule(mass=0.3, min_length=300)
    options = ExportOptions(
        source=tiny_model("llama").path,
        output=tmp_path / "out",
        layers=LayerRequest(layers=(2,)),
        pattern=PatternRequest(4, 24, LAST),
        blocks=BlockRequest((0, 1), rule.mass, rule.min_length),
        last_token_logits=True,
    )
    export(options, SilentObserver())
    config = replace(
        CONFIG,
        triangle_layer_indices=(2,),
        block_sparse_layer_indices=(0, 1),
        block_rule=rule,
    )
    ids = prompt(length)
    expected, shares = _pytorch(ids, config), KeptShares()
    with shares.watching():
        _pytorch(ids, config)
    assert all(share < 0.9 for share in shares.by_layer().values()), "little was dropped"
    native = TriangleSession.from_folder(tmp_path / "out", provider="cpu")
    assert native.kernel == "native"
    for name, logits in (
        ("native", np.asarray(last_logits(native, ids))[0]),
        ("function", _without_library(tmp_path / "out", ids)),
    ):
        error = np.abs(logits - expected).max()
        assert error <= 2e-4 * max(1.0, np.abs(expected).max()), f"{name} is off by {error}"
    dense = _pytorch(ids, replace(config, block_rule=BlockRule(mass=1.0)))
    assert np.abs(dense - expected).max() > 1e-3
