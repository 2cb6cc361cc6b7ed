"""T3: tiny LLMs, exported from every source, generate the tokens of the model they came from."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.exporter.attention.sites import Sites
from trianglemix.exporter.options import ExportOptions, LayerRequest, PatternRequest
from trianglemix.exporter.pipeline import export
from trianglemix.pytorch.config import TriangleMixConfig
from trianglemix.pytorch.patch import patch
from trianglemix.runtime.session import TriangleSession

from tests.tiny_models import PAIRS, tiny_folder, tiny_model

LAYERS: Final = {"gemma2": (1,)}  # its layers 0 and 2 slide a window of their own
DEFAULT_LAYERS: Final = (1, 2)
PATTERN = TrianglePattern(num_sink_tokens=4, sliding_window_size=24, num_last_tokens=8)
SHORT, LONG, NEW_TOKENS = 30, 150, 12
assert PATTERN.num_sink_tokens + PATTERN.sliding_window_size < SHORT + NEW_TOKENS  # decode is dense
assert SHORT <= 36 < LONG  # nothing, and a lot, is dropped


class SilentObserver:
    """Hears the export and says nothing."""

    def stage(self, name: str) -> None: ...

    def progress(self, done: int, total: int) -> None: ...

    def sites(self, sites: Sites) -> None: ...


def exported(
    source: Path, output: Path, layers: tuple[int, ...] = DEFAULT_LAYERS, **changes: Any
) -> TriangleSession:
    options = ExportOptions(
        source=source,
        output=output,
        layers=LayerRequest() if changes.get("dense") else LayerRequest(layers=layers),
        pattern=PatternRequest(*PATTERN.as_attributes().values()),
        **changes,
    )
    export(options, SilentObserver())
    return TriangleSession.from_folder(output, provider="cpu", threads=1)


def prompt(length: int, seed: int = 5) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, 256, length).tolist()
    return ids


@cache
def source_tokens(family: str, length: int, triangle: bool, seed: int = 5) -> list[int]:
    """What transformers generates greedily, with PyTorch's own form of the pattern if asked."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder(family), dtype=torch.float32).eval()
    if triangle:
        layers = LAYERS.get(family, DEFAULT_LAYERS)
        patch(model, TriangleMixConfig(triangle_layer_indices=layers, **PATTERN.as_attributes()))
    ids = torch.tensor([prompt(length, seed)])
    output = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    tokens: list[int] = output[0, length:].tolist()
    return tokens


@pytest.mark.parametrize(("family", "route"), PAIRS)
def test_generated_tokens_equal_the_source(
    family: str,
    route: str,
    tmp_path: Path,
) -> None:
    session = exported(tiny_model(family, route).path, tmp_path / "out", last_token_logits=True)
    assert session.kernel == "native"
    session.stop_ids = frozenset()
    short = session.generate(prompt(SHORT), NEW_TOKENS)
    assert list(short.ids) == source_tokens(family, SHORT, triangle=False)
    long = session.generate(prompt(LONG), NEW_TOKENS)
    assert list(long.ids) == source_tokens(family, LONG, triangle=True)
    chunked = session.generate(prompt(LONG), NEW_TOKENS, prefill_chunk=37)
    assert chunked.ids == long.ids


def test_the_pattern_changes_the_long_prompt() -> None:
    """Else the comparison above could not fail."""
    dense = source_tokens("llama", LONG, triangle=False)
    assert dense != source_tokens("llama", LONG, triangle=True)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_hugging_face_folder_generates_the_source_tokens(family: str, tmp_path: Path) -> None:
    layers = LAYERS.get(family, DEFAULT_LAYERS)
    session = exported(tiny_folder(family), tmp_path / "out", layers)
    data = [path for path in (tmp_path / "out").iterdir() if ".data" in path.name]
    assert data
    assert all(path.stat().st_nlink == 1 for path in data), "a link to the work folder stayed"
    session.stop_ids = frozenset()
    for length, triangle in ((SHORT, False), (LONG, True)):
        result = session.generate(prompt(length), NEW_TOKENS)
        assert list(result.ids) == source_tokens(family, length, triangle)


@pytest.mark.parametrize("target", ["cpu", "hopper"])
def test_rows_of_a_batch_equal_themselves_alone(target: str, tmp_path: Path) -> None:
    source = tiny_model("llama", "torchscript-18").path
    session = exported(source, tmp_path / "out", target=target)
    assert session.manifest.left_padding
    session.stop_ids = frozenset()
    prompts = [prompt(LONG), prompt(SHORT), prompt(LONG - 41, seed=6)]
    together = session.generate(prompts, NEW_TOKENS)
    assert [row.ids for row in together] == [session.generate(p, NEW_TOKENS).ids for p in prompts]


def test_dense_twin_generates_the_source_tokens(tmp_path: Path) -> None:
    model = tiny_model("qwen3", "torchscript-18")
    session = exported(model.path, tmp_path / "out", dense=True)
    session.stop_ids = frozenset()
    result = session.generate(prompt(LONG), NEW_TOKENS)
    assert list(result.ids) == source_tokens("qwen3", LONG, triangle=False)
