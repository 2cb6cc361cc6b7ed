"""vLLM's OpenAI server with the plug-in: answers over HTTP, and the counts in its metrics."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pytest

from tests.vllm_plugin.served_models import (
    CONTEXT,
    LAYERS,
    PYTHON,
    QUIET,
    SECTION,
    check,
    expected,
    needs_vllm,
    prompt,
    served_folder,
)

pytestmark = needs_vllm
TOKENS: Final = 8
START_SECONDS: Final = 200
LENGTHS: Final = (501, 37, 333, 1, 90, 200)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address; workers in processes of their own, prompts in steps of 128 tokens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    work = tmp_path_factory.mktemp("server")
    options = {
        "model": str(served_folder("qwen3")), "served-model-name": "tiny", "port": str(port),
        "host": "127.0.0.1", "dtype": "float32", "max-model-len": str(CONTEXT),
        "max-num-batched-tokens": "128", "max-num-seqs": "4", "block-size": "32",
        "additional-config": json.dumps({"trianglemix": SECTION}),
    }  # fmt: skip
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", *arguments]
    with (work / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [*command, "--enforce-eager"], stdout=log, stderr=subprocess.STDOUT, cwd=work,
            env=os.environ | QUIET | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        )  # fmt: skip
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(process, address, work)
            yield address
        finally:
            process.terminate()
            process.wait(timeout=60)
    assert "TriangleMix: triangle layers 1-2" in (work / "log.txt").read_text(encoding="utf-8")


def _wait(process: subprocess.Popen[bytes], address: str, work: Any) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, (work / "log.txt").read_text(encoding="utf-8")[-4000:]
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError((work / "log.txt").read_text(encoding="utf-8")[-4000:])


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
