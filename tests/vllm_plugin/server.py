"""vLLM's OpenAI server on a CPU with a tiny model, named `tiny`, and our triangle layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from benchmarks.vllm_server import Server
from tests.vllm_plugin.served_models import CONTEXT, PYTHON, QUIET, SECTION, served_folder

START_SECONDS: Final = 200.0


def serve(family: str, log: Path) -> Server:
    """Prompts in steps of 128 tokens, four at once."""
    options = {
        "model": str(served_folder(family)), "served-model-name": "tiny", "dtype": "float32",
        "max-model-len": str(CONTEXT), "max-num-batched-tokens": "128", "max-num-seqs": "4",
        "block-size": "32", "additional-config": json.dumps({"trianglemix": SECTION}),
        "enforce-eager": None,
    }  # fmt: skip
    return Server(PYTHON, options, QUIET, log)
