"""vLLM's OpenAI server with the plug-in: answers over HTTP, and the counts in its metrics."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pytest

from tests.vllm_plugin.served_models import (
    LAYERS,
    check,
    expected,
    needs_vllm,
    prompt,
)
from tests.vllm_plugin.server import START_SECONDS, serve

pytestmark = needs_vllm
TOKENS: Final = 8
LENGTHS: Final = (501, 37, 333, 1, 90, 200)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address; workers in processes of their own, prompts in steps of 128 tokens."""
    with serve("qwen3", tmp_path_factory.mktemp("server") / "log.txt") as running:
        yield running.address(START_SECONDS)
    assert "TriangleMix: triangle layers 1-2" in running.log()


def _complete(address: str, ids: tuple[int, ...]) -> dict[str, Any]:
    asked = {
        "model": "tiny", "prompt": list(ids), "max_tokens": TOKENS, "temperature": 0,
        "logprobs": 1, "ignore_eos": True, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        (choice,) = json.load(reply)["choices"]
    tokens = [int(text.removeprefix("token_id:")) for text in choice["logprobs"]["tokens"]]
    return {"tokens": tokens, "logs": choice["logprobs"]["token_logprobs"]}


def _rows(address: str) -> dict[tuple[int, str], float]:
    with urllib.request.urlopen(f"{address}/metrics", timeout=20) as reply:
        text = reply.read().decode()
    pattern = r'^vllm:trianglemix_rows_total\{kind="(\w+)",layer="(\d+)"\} (\S+)$'
    found = re.findall(pattern, text, re.MULTILINE)
    return {(int(layer), kind): float(value) for kind, layer, value in found}


def test_a_server_answers_many_at_once(server: str) -> None:
    prompts = [prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda ids: _complete(server, ids), prompts))
    for found, ids in zip(answers, prompts, strict=True):
        check(found, expected("qwen3", ids, TOKENS))


def test_its_metrics_count_the_rows(server: str) -> None:
    before, ids = _rows(server), prompt(401, seed=77)
    _complete(server, ids)
    after = _rows(server)
    for layer in LAYERS:
        gained = {kind: after[layer, kind] - before.get((layer, kind), 0)
                  for kind in ("triangle", "dense")}  # fmt: skip
        assert gained == {"triangle": 401 - 8 - 28, "dense": 8 + 28 + TOKENS - 1}
