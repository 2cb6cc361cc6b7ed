"""SmolLM2 for Ascend, its graphs run on ONNX Runtime, beside the CPU operator."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pytest
from numpy.typing import NDArray
from trianglemix.exporter.options import ExportOptions
from trianglemix.exporter.pipeline import export
from trianglemix.exporter.targets.ascend.options import AscendRequest
from trianglemix.runtime.session import TriangleSession

from source_models.smollm2 import SourceModelError, plain_onnx, weights_file
from tests.exporter.targets.ascend.exported import Silent

try:
    weights_file()
except SourceModelError as error:
    pytest.skip(f"SmolLM2 is not tested: {error}", allow_module_level=True)

LENGTHS: Final = (5, 60, 127, 129, 200, 270, 333, 410, 650, 777)
"""The tail has 128 rows, a chunk 256; from 649 tokens on keys are dropped."""
_TEXT: Final = Path(__file__).resolve().parents[4] / "docs" / "conventions.md"
_TOKENS: Final = 4


def test_ten_prompts_of_ten_lengths(tmp_path: Path) -> None:
    source = plain_onnx()
    request = AscendRequest(chunk=256, max_length=1024)
    export(ExportOptions(source, tmp_path / "ascend", target="ascend", settings=request), Silent())
    export(ExportOptions(source, tmp_path / "cpu", last_token_logits=True), Silent())
    ascend, cpu = (
        TriangleSession.from_folder(tmp_path / name, threads=2) for name in ("ascend", "cpu")
    )
    assert len(ascend.manifest.triangle_layers) == 20
    assert ascend.tokenizer is not None
    ids = ascend.tokenizer.encode(_TEXT.read_text(encoding="utf-8"))
    for number, length in enumerate(LENGTHS):
        prompt = np.array([ids[30 * number : 30 * number + length]])
        assert prompt.shape[1] == length
        got, want = greedy(ascend, prompt), greedy(cpu, prompt)
        assert np.abs(got - want).max() < 1e-3, length
        assert (got.argmax(-1) == want.argmax(-1)).all(), length


def greedy(session: TriangleSession, prompt: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits `[tokens, vocabulary]` behind a prompt and its greedy continuation."""
    cache, end, rows = session.new_cache(), prompt.shape[1], []
    tokens = prompt
    for _ in range(_TOKENS):
        logits = cache.extend(tokens, None, end)
        assert logits is not None
        rows.append(np.array(logits[0]))
        tokens = logits.argmax(-1)[:, None]
    return np.stack(rows)
