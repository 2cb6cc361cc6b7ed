"""Gemma 3 270M, whose layers slide a window of 512 in 15 of 18: its tokens, by both routes.

Needs `make gemma3`, which fetches the weights; without them it is skipped. Minutes, 3 GB.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from transformers import AutoModelForCausalLM
from trianglemix.exporter.options import ExportOptions, LayerRequest
from trianglemix.exporter.pipeline import export
from trianglemix.pytorch import TriangleMixConfig, patch, unpatch
from trianglemix.runtime.session import TriangleSession

from source_models.gemma3 import hugging_face_folder, plain_onnx, weights_file
from source_models.smollm2 import SourceModelError
from tests.end_to_end.test_tiny_llm import SilentObserver

try:
    weights_file()
except SourceModelError as error:
    pytest.skip(f"Gemma 3 is not tested: {error}", allow_module_level=True)

TRIANGLE_LAYERS: Final = (11, 17)
"""Two of the three layers (5, 11, 17) that see the whole prompt."""
NEW_TOKENS: Final = 16
PROMPTS: Final = {"short": 24, "beyond the window": 1500}
TEXT: Final = (
    "The lighthouse keeper wrote down the weather every evening, and every morning he read what "
    "he had written. In the year {year} the storm came from the north, and the boats stayed in. "
)


@lru_cache(maxsize=1)
def _model() -> Any:
    return AutoModelForCausalLM.from_pretrained(hugging_face_folder()).eval()


def _prompt(session: TriangleSession, tokens: int) -> list[int]:
    assert session.tokenizer is not None
    text = "".join(TEXT.format(year=1801 + n) for n in range(60))
    return session.tokenizer.encode(text)[:tokens]


def _greedy(model: Any, ids: list[int]) -> list[int]:
    prompt = torch.tensor([ids])
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
    )
    tokens: list[int] = made[0, len(ids) :].tolist()
    return tokens


@pytest.fixture(scope="module", params=["folder", "onnx", "onnx, dense twin"])
def session(request: Any, tmp_path_factory: pytest.TempPathFactory) -> TriangleSession:
    route, _, dense = request.param.partition(", ")
    source: Path = hugging_face_folder() if route == "folder" else plain_onnx()
    output = tmp_path_factory.mktemp("gemma3") / "out"
    layers = LayerRequest() if dense else LayerRequest(layers=TRIANGLE_LAYERS)
    options = ExportOptions(source, output, layers=layers, dense=bool(dense), verify=True)
    export(options, SilentObserver())
    return TriangleSession.from_folder(output, provider="cpu")


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_tokens_are_those_of_transformers(session: TriangleSession, name: str) -> None:
    """With triangle layers: transformers patched with the same ones."""
    ids = _prompt(session, PROMPTS[name])
    assert len(ids) == PROMPTS[name]
    layers = session.manifest.triangle_layers
    assert layers in ((), TRIANGLE_LAYERS)
    model = _model()
    if layers:
        patch(model, TriangleMixConfig.from_pattern(session.manifest.pattern, layers))
    try:
        expected = _greedy(model, ids)
    finally:
        if layers:
            unpatch(model)
    result = session.generate(ids, NEW_TOKENS)
    assert result.kernel == "native"
    assert len(result.ids) > 4
    assert list(result.ids) == expected[: len(result.ids)]
