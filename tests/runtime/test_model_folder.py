"""Which tokens end a text: by the first file that says so, in transformers' order."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from trianglemix.runtime import TriangleSession
from trianglemix.runtime.errors import PromptError
from trianglemix.runtime.model_folder import ModelFolder

GENERATION, CONFIG, GENAI = "generation_config.json", "config.json", "genai_config.json"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / GENERATION).unlink()
    return tmp_path / "copy"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, set()),
        ({GENERATION: {"eos_token_id": 3}, CONFIG: {"eos_token_id": 4}}, {3}),
        ({GENERATION: {"eos_token_id": [3, 5]}, CONFIG: {"eos_token_id": 4}}, {3, 5}),
        ({GENERATION: {}, CONFIG: {"eos_token_id": 4}}, {4}),
        ({GENERATION: {"eos_token_id": [5, None]}, CONFIG: {"eos_token_id": 4}}, {5}),
        ({GENERATION: {"eos_token_id": True}, CONFIG: {"eos_token_id": 4}}, {4}),
        ({GENERATION: {"eos_token_id": None}, CONFIG: {"eos_token_id": [4]}}, {4}),
        ({CONFIG: {"text_config": {"eos_token_id": 6}}}, {6}),
        ({CONFIG: {"eos_token_id": []}, GENAI: {"model": {"eos_token_id": [7, 8]}}}, {7, 8}),
        ({GENAI: {"model": {"eos_token_id": 7}}}, {7}),
        ({GENAI: {"model": []}}, set()),
    ],
)
def test_stop_tokens(files: dict[str, Any], expected: set[int], copy: Path) -> None:
    for name, content in files.items():
        (copy / name).write_text(json.dumps(content))
    assert ModelFolder.load(copy).stop_ids == expected


def test_where_no_file_says_so_the_tokenizers_counts(copy: Path) -> None:
    assert TriangleSession.from_folder(copy, "cpu", threads=1).stop_ids == {257}
    (copy / CONFIG).write_text('{"eos_token_id": 3}')
    assert TriangleSession.from_folder(copy, "cpu", threads=1).stop_ids == {3}


@pytest.mark.parametrize("token", [-1, 263])
def test_a_token_outside_the_vocabulary(token: int, session: TriangleSession) -> None:
    with pytest.raises(PromptError, match=rf"token id {token}, but the model's go from 0 to 262"):
        session.generate([1, token, 2], 1)
