"""A handful of the families of docs/families.md, one for each way to be right or refused."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tools.families.page import PAGE
from tools.families.tiny_model import tiny_model
from tools.families.try_family import export_right, guarded, patch_right


@pytest.mark.parametrize(
    ("family", "exported", "patched"),
    [
        ("opt", "right", "right"),
        ("cohere2", "right", "right"),
        ("minicpm3", "right", "right"),
        ("qwen3_next", "are linear_attention", "right"),
        ("olmoe", "mixture of experts", "right"),
        ("falcon", "in code of their own", "FalconForCausalLM does not call"),
        ("gpt_oss", "attention sinks", "attention sinks"),
        ("llama4_text", "chunks of 8 tokens", "chunked_attention"),
    ],
)
def test_a_family_is_right_or_refused_for_its_own_reason(
    family: str, exported: str, patched: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    for outcome, expected in (
        (guarded(lambda: export_right(model, tmp_path)), exported),
        (guarded(lambda: patch_right(model)), patched),
    ):
        if expected == "right":
            assert outcome.status == "right", outcome
        else:
            assert outcome.status == "refused", outcome
            assert expected in outcome.detail


def test_the_page_names_every_family_and_none_is_wrong() -> None:
    page = PAGE.read_text(encoding="utf-8")
    if f"transformers {version('transformers')}," not in page:
        pytest.skip("the page was written for another transformers; run `make families`")
    missing = [
        name
        for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if f"| {name} |" not in page and f"- {name}:" not in page
    ]
    assert not missing
    assert "WRONG" not in page
