"""The CUDA backend on a GPU with FlashAttention 3: `python -m pytest -m gpu tests/vllm_plugin`.

The python that runs the tests has vLLM, torch with CUDA and transformers; the package may lie on
its path alone. float16, which tells a pattern from its neighbours where bfloat16 hardly does: the
served model must be as near to float32 as the served dense one is.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.triangle.contract import TrianglePattern

from tests.vllm_plugin.served_models import run_engine, sparse_rows

_PRESENT: Final = torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _PRESENT, reason="no GPU, or no vLLM beside it: nothing is served"),
]
PATTERN: Final = TrianglePattern(4, 64, 32)
LAYERS: Final = (2, 3)
SECTION: Final = {"layers": "2-3", "pattern": [4, 64, 32]}
RULE: Final = BlockRule(mass=0.2, min_length=256)
"""Of random weights' diffuse attention. At 0.9 what is dropped is less than float16's noise."""
BLOCK_LAYERS: Final = (1, 2, 3)
BLOCKS_SECTION: Final = {
    "layers": "none", "block_sparse_layers": "1-3", "mass": 0.2, "min_length": 256,
}  # fmt: skip
LENGTHS: Final = (4000, 101, 3001)
TOKENS: Final = 8
VOCABULARY: Final = 1024
BUDGET: Final = 1024
CUTTING_BUDGET: Final = 1000
HERE: Final = {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "VLLM_USE_V2_MODEL_RUNNER": "0",
               "VLLM_USE_FLASHINFER_SAMPLER": "0"}  # fmt: skip
STOCK: Final = HERE | {"VLLM_PLUGINS": "none"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 4 layers, 8 heads on 2 of 128, whose attention is not uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(20261128)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128, vocab_size=VOCABULARY, max_position_embeddings=8192,
        initializer_range=0.04, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    target = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).half().save_pretrained(target)
    return target


def _prompt(length: int) -> list[int]:
    torch.manual_seed(length)
    return torch.randint(3, VOCABULARY, (length,)).tolist()


def _serve(
    folder: Path, work: Path, section: Any, budget: int = BUDGET, **engine: Any
) -> dict[str, Any]:
    """Each prompt alone, then all at once, in steps of `budget` tokens."""
    rounds = [{"prompts": [_prompt(n)], "tokens": TOKENS, "budget": budget} for n in LENGTHS]
    rounds.append({"prompts": [_prompt(n) for n in LENGTHS], "tokens": TOKENS, "budget": budget})
    given: dict[str, Any] = {
        "dtype": "float16", "max_model_len": 8192, "gpu_memory_utilization": 0.3,
        "skip_tokenizer_init": True, "block_size": 16,
    }  # fmt: skip
    return run_engine(
        "", rounds, work, section, STOCK if section is None else HERE, folder,
        Path(sys.executable), **given | engine,
    )  # fmt: skip


@lru_cache(maxsize=3)
def _reference(folder: Path, kind: str) -> Any:
    """In float32: "dense", or patched with the layers of "triangle" or "blocks"."""
    from transformers import AutoModelForCausalLM
    from trianglemix.pytorch import TriangleMixConfig, patch

    torch.backends.cuda.matmul.allow_tf32 = False
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
    if kind == "triangle":
        return patch(model, TriangleMixConfig.from_pattern(PATTERN, LAYERS))
    if kind == "blocks":
        config = TriangleMixConfig(block_sparse_layer_indices=BLOCK_LAYERS, block_rule=RULE)
        return patch(model, config)
    return model


def _distance(folder: Path, answer: dict[str, Any], length: int, kind: str) -> float:
    """Largest difference of log-probability along the served answer, to the model in float32.

    It reads the prompt in the calls that the engine's steps were.
    """
    from trianglemix.pytorch import prompt_length

    ids = torch.tensor([[*_prompt(length), *answer["tokens"][:-1]]]).cuda()
    model, past, logits = _reference(folder, kind), None, []
    with torch.no_grad(), prompt_length(length):
        for begin, end in pairwise([*answer["starts"], ids.shape[1]]):
            made = model(ids[:, begin:end], past_key_values=past, use_cache=True)
            past = made.past_key_values
            logits.append(made.logits[0].float())
    rows = torch.log_softmax(torch.cat(logits)[length - 1 :], -1)
    right = rows[torch.arange(TOKENS), torch.tensor(answer["tokens"])]
    return float((right.cpu() - torch.tensor(answer["logs"])).abs().max())


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_triangle_is_as_near_to_float32_as_dense_is(
    folder: Path, tmp_path: Path, eager: bool
) -> None:
    dense = _serve(folder, tmp_path / "stock", None, enforce_eager=eager)
    served = _serve(folder, tmp_path / "ours", SECTION, enforce_eager=eager)
    assert set(served["layers"].values()) == {"TriangleFlashImpl"}
    _compare(folder, dense, served)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU: no ranks to compare")
def test_two_gpus_are_as_near_as_one(folder: Path, tmp_path: Path) -> None:
    """Workers in processes of their own, so the entry point must be there."""
    dense = _serve(folder, tmp_path / "stock", None, tensor_parallel_size=2)
    served = _serve(folder, tmp_path / "ours", SECTION, tensor_parallel_size=2)
    assert served["counts"], "no row was counted: the workers do not know the plug-in"
    _compare(folder, dense, served)


@pytest.mark.parametrize(("budget", "page"), [(BUDGET, 16), (BUDGET, 128), (CUTTING_BUDGET, 128)])
def test_block_sparse_is_as_near_to_float32_as_dense_is(
    folder: Path, tmp_path: Path, budget: int, page: int
) -> None:
    """Steps that begin on tiles' edges, but for those of several prompts, and steps that do not.

    Pages of 16 are gathered, larger ones read in place.
    """
    dense = _serve(folder, tmp_path / "stock", None, budget, block_size=page)
    served = _serve(folder, tmp_path / "ours", BLOCKS_SECTION, budget, block_size=page)
    assert served["rounds"][0][0]["starts"] == list(range(0, LENGTHS[0], budget))
    _compare(folder, dense, served, "blocks")
    answers = [(answer, length) for round_, lengths in _rounds(served)
               for answer, length in zip(round_, lengths, strict=True)]  # fmt: skip
    ours = sum(sparse_rows(answer["starts"], length, RULE) for answer, length in answers)
    assert ours > sum(length for _, length in answers) / 2
    assert {layer: rows["block_sparse"] for layer, rows in served["counts"].items()} == {
        str(layer): ours for layer in BLOCK_LAYERS
    }  # fmt: skip


def _rounds(served: dict[str, Any]) -> list[tuple[list[dict[str, Any]], list[int]]]:
    asked = [*([length] for length in LENGTHS), list(LENGTHS)]
    return list(zip(served["rounds"], asked, strict=True))


def _compare(
    folder: Path, dense: dict[str, Any], served: dict[str, Any], kind: str = "triangle"
) -> None:
    noise, found, effect = [], [], []
    for (ours, lengths), (stock, _) in zip(_rounds(served), _rounds(dense), strict=True):
        for mine, theirs, length in zip(ours, stock, lengths, strict=True):
            noise.append(_distance(folder, theirs, length, "dense"))
            found.append(_distance(folder, mine, length, kind))
            effect.append(_distance(folder, mine, length, "dense"))
    print(f"dense {max(noise):.4f}, {kind} {max(found):.4f}, its own effect {max(effect):.4f}")
    assert max(found) < 2 * max(noise) + 2e-3
    assert max(effect) > 2 * max(found), "what is dropped does too little here to be seen"


def test_rows_are_counted(folder: Path, tmp_path: Path) -> None:
    served = _serve(folder, tmp_path, SECTION)
    span = PATTERN.num_sink_tokens + PATTERN.sliding_window_size
    streaming = 2 * sum(max(0, n - PATTERN.num_last_tokens - span) for n in LENGTHS)
    assert {rows["triangle"] for rows in served["counts"].values()} == {streaming}


def test_short_prompts_are_stock_s_bits(folder: Path, tmp_path: Path) -> None:
    rounds = [{"prompts": [_prompt(n)], "tokens": TOKENS, "budget": None} for n in (1, 70, 100)]
    given: dict[str, Any] = {"dtype": "float16", "gpu_memory_utilization": 0.3, "block_size": 16,
                             "skip_tokenizer_init": True}  # fmt: skip
    python = Path(sys.executable)
    stock = run_engine("", rounds, tmp_path / "a", None, STOCK, folder, python, **given)
    served = run_engine("", rounds, tmp_path / "b", SECTION, HERE, folder, python, **given)
    assert served["rounds"] == stock["rounds"]
