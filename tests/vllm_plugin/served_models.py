"""Tiny models for vLLM's CPU kernels, the answers of `patch()`, and engines run beside us."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.triangle.contract import TrianglePattern

from source_models.model_cache import BUILD, cached_folder
from source_models.tiny_tokenizer import VOCABULARY_SIZE, save_tokenizer

ROOT: Final = Path(__file__).resolve().parents[2]
ENVIRONMENT: Final = ROOT / "build" / "envs" / "vllm"
PYTHON: Final = ENVIRONMENT / "bin" / "python"
needs_vllm: Final = pytest.mark.skipif(
    not (ENVIRONMENT / "complete").is_file(),
    reason="nothing is served: no build/envs/vllm, run `make vllm`",
)
FAMILIES: Final = ("qwen3", "llama")
LAYERS: Final = (1, 2)
PATTERN: Final = TrianglePattern(4, 24, 8)
RULE: Final = BlockRule(
    mass=0.6, min_length=200, num_sink_tokens=4, sliding_window_size=1, num_last_tokens=8
)
BLOCK_LAYERS: Final = (0, 1)
CONTEXT: Final = 1024
TOLERANCE: Final = 5e-5
"""Of log-probabilities, in float32, after three layers of two programs' own kernels."""
SECTION: Final = {"layers": "1-2", "pattern": [4, 24, 8]}
BLOCKS_SECTION: Final = {
    "layers": "2", "pattern": [4, 24, 8], "block_sparse_layers": "0-1",
    "block_rule": RULE.as_attributes(),
}  # fmt: skip
QUIET: Final = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "PYTHONPATH": "",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip
_RECIPE: Final = 1


@dataclass(frozen=True)
class Answer:
    """Tokens of a greedy answer, each with its log-probability."""

    tokens: tuple[int, ...]
    logs: tuple[float, ...]


def served_folder(family: str, **changes: Any) -> Path:
    """A Hugging Face folder of random weights: 3 layers, 4 heads on 2, head size 32."""
    name = "-".join(["vllm", family, *(f"{k}{v}" for k, v in changes.items()), f"r{_RECIPE}"])

    def make(target: Path) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(20261128)
        sizes = dict(
            vocab_size=VOCABULARY_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=False,
            max_position_embeddings=2048, initializer_range=0.25, bos_token_id=256,
            eos_token_id=257, pad_token_id=258,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | changes))
        for label, tensor in model.named_parameters():
            if "norm" in label:
                tensor.data += 0.2 * torch.randn_like(tensor)
        model.save_pretrained(target)
        save_tokenizer(target)

    return cached_folder(BUILD / "tiny_models", name, ("torch", "transformers"), make)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Token ids; those of one seed begin alike."""
    numbers = random.Random(seed)
    return tuple(numbers.randrange(3, 250) for _ in range(CONTEXT))[:length]


@lru_cache(maxsize=6)
def _model(family: str, served: str) -> Any:
    """Patched as `SECTION` ("triangle") or `BLOCKS_SECTION` ("blocks") says, or "dense"."""
    import torch
    from transformers import AutoModelForCausalLM
    from trianglemix.pytorch import TriangleMixConfig, patch

    folder = served_folder(family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if served == "dense":
        return model
    config = TriangleMixConfig.from_pattern(PATTERN, LAYERS)
    if served == "blocks":
        config = TriangleMixConfig.from_pattern(PATTERN, (2,))
        config = replace(config, block_sparse_layer_indices=BLOCK_LAYERS, block_rule=RULE)
    return patch(model, config)


@lru_cache(maxsize=256)
def expected(family: str, ids: tuple[int, ...], tokens: int, served: str = "triangle") -> Answer:
    """The answer of `trianglemix.pytorch.patch`, or of the dense model."""
    return greedy_answer(_model(family, served), ids, tokens)


def greedy_answer(model: Any, ids: tuple[int, ...], tokens: int) -> Answer:
    """A transformers model's answer to a prompt."""
    import torch

    made = model.generate(
        torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, eos_token_id=None,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    answer = made.sequences[0, len(ids) :].tolist()
    steps = zip(made.logits, answer, strict=True)
    logs = tuple(float(torch.log_softmax(row[0], -1)[token]) for row, token in steps)
    return Answer(tuple(answer), logs)


def expected_after_hit(
    family: str, ids: tuple[int, ...], cached: int, earlier: int, tokens: int,
    served: str = "triangle",
) -> Answer:  # fmt: skip
    """As `expected`, but the first `cached` tokens were read as the beginning of a prompt of
    `earlier` tokens, whose last rows were dense."""
    return expected_in_chunks(family, ids, (0, cached), tokens, served, earlier)


def expected_in_chunks(
    family: str, ids: tuple[int, ...], starts: Sequence[int], tokens: int, served: str,
    earlier: int | None = None,
) -> Answer:  # fmt: skip
    """As `expected`, the prompt read in calls that begin at `starts`, by hand.

    The first is read as the beginning of a prompt of `earlier` tokens, where that is given.
    """
    import torch
    from trianglemix.pytorch import prompt_length

    model, given, answer, logs = _model(family, served), torch.tensor([ids]), [], []
    past = None
    with torch.no_grad():
        for number, (begin, end) in enumerate(pairwise([*starts, len(ids)])):
            with prompt_length(len(ids) if number or earlier is None else earlier):
                made = model(given[:, begin:end], past_key_values=past, use_cache=True)
            past = made.past_key_values
        row = made.logits[0, -1]
        with prompt_length(len(ids)):
            for _ in range(tokens):
                probable = torch.log_softmax(row, -1)
                answer.append(int(probable.argmax()))
                logs.append(float(probable.max()))
                row = model(torch.tensor([[answer[-1]]]), past_key_values=past).logits[0, -1]
    return Answer(tuple(answer), tuple(logs))


def sparse_rows(starts: Sequence[int], length: int, rule: BlockRule) -> int:
    """How many rows of a prompt of `length` tokens are sparse if its steps begin at `starts`."""
    if length <= rule.min_length:
        return 0
    found = 0
    for start, stop in pairwise([*starts, length]):
        for tile in range(-(-start // 128) * 128, stop - 15, 128):  # its 16th row is here
            if tile + 128 <= length - rule.num_last_tokens:
                found += min(tile + 128, stop) - tile
    return found


def run_engine(
    family: str,
    rounds: Sequence[Mapping[str, Any]],
    work: Path,
    section: Mapping[str, Any] | None = SECTION,
    environment: Mapping[str, str] | None = None,
    model: Path | None = None,
    python: Path = PYTHON,
    **engine: Any,
) -> dict[str, Any]:
    """What tests/vllm_plugin/engine_run.py answers; `section` None = no configuration of ours.

    Raises AssertionError with the end of the engine's log where it fails.
    """
    given = {
        "dtype": "float32", "max_model_len": CONTEXT, "enforce_eager": True, "max_num_seqs": 4,
        "enable_prefix_caching": False, "block_size": 32, "disable_log_stats": True,
    }  # fmt: skip
    given |= {"additional_config": {"trianglemix": dict(section)}} if section is not None else {}
    job = {"model": str(model or served_folder(family)), "engine": given | engine, "rounds": rounds}
    job["register"] = python != PYTHON and section is not None
    work.mkdir(parents=True, exist_ok=True)
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    program = Path(__file__).with_name("engine_run.py")
    done = subprocess.run(
        [str(python), str(program), str(work / "job.json"), str(work / "result.json")],
        capture_output=True, text=True, cwd=work, timeout=280,
        env=os.environ | QUIET | dict(environment or {}),
    )  # fmt: skip
    (work / "log.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    result: dict[str, Any] = json.loads((work / "result.json").read_text(encoding="utf-8"))
    return result


def check(found: Mapping[str, Any], answer: Answer) -> None:
    """The same tokens, and log-probabilities within `TOLERANCE`."""
    assert tuple(found["tokens"]) == answer.tokens
    assert found["logs"] == pytest.approx(answer.logs, abs=TOLERANCE, rel=0)
