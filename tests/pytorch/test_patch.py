"""A patched transformers model equals the same model with the predicate's mask, token by token."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.triangle.pattern import keep
from trianglemix.pytorch import (
    TriangleMixConfig,
    UnsupportedModelError,
    patch,
    prompt_length,
    register,
    unpatch,
)

from tests.tiny_models import tiny_folder

CONFIG = TriangleMixConfig(4, 24, 8, triangle_layer_indices=[1, 2])
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gpt2")
TOLERANCE = dict(atol=2e-4, rtol=1e-4)


@lru_cache(maxsize=8)
def _loaded(family: str) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder(family))
    model.eval()
    loaded: nn.Module = model
    return loaded


def _model(family: str) -> Any:
    return copy.deepcopy(_loaded(family))


def _ids(*shape: int) -> Tensor:
    return torch.randint(0, 250, shape, generator=torch.Generator().manual_seed(11))


def _masked_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any
) -> tuple[Tensor, None]:
    """Whole prompts without pads only: softmax over all scores, with the predicate's mask."""
    position = torch.arange(query.shape[2]).numpy()
    mask = position[:, None] >= position[None, :]
    if module.layer_idx in (CONFIG.triangle_layer_indices or ()):
        mask = keep(position[:, None], position[None, :], CONFIG.pattern, query.shape[2])
    group = query.shape[1] // key.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (key, value))
    scale = given.get("scaling") or query.shape[3] ** -0.5
    scores = query.double() @ k.transpose(2, 3) * scale
    scores = scores.masked_fill(~torch.from_numpy(mask), float("-inf"))
    return (torch.softmax(scores, -1) @ v).float().transpose(1, 2), None


def _expected(family: str, ids: Tensor) -> Tensor:
    AttentionInterface.register("predicate", _masked_attention)
    model = _model(family)
    model.set_attn_implementation("predicate")
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_equals_the_predicate(family: str) -> None:
    ids = _ids(2, 150)
    model = patch(_model(family), CONFIG)
    with torch.no_grad():
        got = model(ids).logits
    torch.testing.assert_close(got, _expected(family, ids), **TOLERANCE)
    dense = _model(family)
    with torch.no_grad():
        assert (dense(ids).logits - got).abs().max() > 1e-2, "the triangle changed nothing"


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_short_prompts_and_decoding_are_the_models_own(family: str) -> None:
    ids = _ids(1, 30)
    config = TriangleMixConfig(4, 24, 8, triangle_layer_indices=[1])
    tokens = [
        model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
        for model in (_model(family), patch(_model(family), config))
    ]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_left_padded_rows_equal_themselves_alone(family: str) -> None:
    model = patch(_model(family), CONFIG)
    lengths, width = (150, 97, 20), 150
    ids = _ids(3, width)
    mask = torch.zeros(3, width, dtype=torch.long)
    for b, n in enumerate(lengths):
        mask[b, width - n :] = 1
    settings: dict[str, Any] = dict(max_new_tokens=10, do_sample=False, eos_token_id=None)
    batch = model.generate(ids, attention_mask=mask, **settings)
    for b, n in enumerate(lengths):
        alone = model.generate(ids[b : b + 1, width - n :], **settings)
        assert torch.equal(batch[b, width:], alone[0, n:]), f"row {b}"


def test_right_padded_rows_equal_themselves_alone() -> None:
    model = patch(_model("llama"), CONFIG)
    ids, mask = _ids(2, 120), torch.ones(2, 120, dtype=torch.long)
    mask[1, 90:] = 0
    with torch.no_grad():
        got = model(ids, attention_mask=mask).logits[1, :90]
        alone = model(ids[1:, :90]).logits[0]
    torch.testing.assert_close(got, alone, **TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 13, 64])
def test_chunked_prefill_gives_the_tokens_of_one_pass(chunk: int) -> None:
    model = patch(_model("qwen3"), CONFIG)
    ids = _ids(1, 140)
    settings: dict[str, Any] = dict(max_new_tokens=10, do_sample=False, eos_token_id=None)
    whole = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, prefill_chunk_size=chunk, **settings), whole)


def test_chunks_by_hand_need_the_prompt_length() -> None:
    model = patch(_model("llama"), CONFIG)
    ids = _ids(1, 140)
    with torch.no_grad():
        whole = model(ids).logits
        for declared in (True, False):
            cache, pieces = None, []
            for piece in ids.split(50, dim=1):
                if declared:
                    with prompt_length(140):
                        output = model(piece, past_key_values=cache, use_cache=True)
                else:
                    output = model(piece, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                pieces.append(output.logits)
            same = torch.allclose(torch.cat(pieces, 1), whole, **TOLERANCE)
            assert same == declared


def test_a_preallocated_cache_gives_the_same_tokens() -> None:
    model = patch(_model("llama"), CONFIG)
    settings: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    ids = _ids(1, 120)
    whole = model.generate(ids, **settings)
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **settings)
    assert torch.equal(static, whole)


def test_sliding_layers_stay_as_they_are() -> None:
    """Gemma2 slides in layers 0 and 2; with layer 1 wide open nothing may change."""
    ids = _ids(1, 100)
    wide = TriangleMixConfig(0, 1000, 1, triangle_layer_indices=[1])
    reference = _model("gemma2")
    reference.set_attn_implementation("eager")
    settings: dict[str, Any] = dict(max_new_tokens=10, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        torch.testing.assert_close(
            patch(_model("gemma2"), wide)(ids).logits, reference(ids).logits, **TOLERANCE
        )
    tokens = patch(_model("gemma2"), wide).generate(ids, **settings)
    assert torch.equal(tokens, reference.generate(ids, **settings))
    with pytest.raises(UnsupportedModelError, match=r"layer 2 of Gemma2\w+ is sliding_"):
        patch(_model("gemma2"), CONFIG)


def test_a_saved_model_keeps_its_layers(tmp_path: Path) -> None:
    model = patch(_model("llama"), CONFIG)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    register()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="trianglemix")
    ids = _ids(1, 120)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_unpatch_gives_the_model_back() -> None:
    model, ids = patch(_model("llama"), CONFIG), _ids(1, 120)
    with torch.no_grad():
        torch.testing.assert_close(unpatch(model)(ids).logits, _model("llama")(ids).logits)
    assert "generate" not in model.__dict__


def test_a_copy_generates_with_its_own_weights() -> None:
    model = patch(_model("llama"), CONFIG)
    other: Any = copy.deepcopy(model)
    ids, given = _ids(1, 40), dict(max_new_tokens=1, eos_token_id=None, do_sample=False)
    with torch.no_grad():
        other.get_input_embeddings().weight.normal_(generator=torch.Generator().manual_seed(3))
        new, old = other(ids).logits[0, -1].argmax(), model(ids).logits[0, -1].argmax()
    assert new != old
    assert other.generate(ids, **given)[0, -1] == new
    assert model.generate(ids, **given)[0, -1] == old  # type: ignore[operator]


_LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
kind, path = sys.argv[1:]
if kind == "pickle":
    model = torch.load(path, weights_only=False)
else:
    model = AutoModelForCausalLM.from_pretrained(path).eval()
ids = torch.arange(120)[None]
logits, tokens = model(ids).logits[0, -1], model.generate(ids, max_new_tokens=2)
print(json.dumps([logits.tolist(), tokens.tolist()]))
"""


def in_a_new_process(kind: str, path: Path, model: Any) -> float:
    """How far a stored model's logits are off there; its tokens must be the model's."""
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, kind, str(path)], capture_output=True, text=True, check=True
    )
    logits, tokens = json.loads(done.stdout.splitlines()[-1])
    ids = torch.arange(120)[None]
    assert model.generate(ids, max_new_tokens=2).tolist() == tokens
    with torch.no_grad():
        expected = model(ids).logits[0, -1]
    return float((torch.tensor(logits) - expected).abs().max())


def test_a_pickled_model_stays_patched_and_a_saved_one_needs_nothing_of_ours(
    tmp_path: Path,
) -> None:
    model = patch(_model("llama"), CONFIG)
    torch.save(model, tmp_path / "model.pt")
    assert in_a_new_process("pickle", tmp_path / "model.pt", model) < 1e-5
    model.save_pretrained(tmp_path / "folder")  # type: ignore[operator]
    assert in_a_new_process("folder", tmp_path / "folder", unpatch(model)) < 1e-5


def test_a_model_without_a_head_is_patched_and_other_modules_are_refused() -> None:
    whole, ids = patch(_model("llama"), CONFIG), _ids(1, 120)
    inner = patch(_model("llama").model, CONFIG)
    with torch.no_grad():
        expected = whole.model(ids)  # type: ignore[operator]
        torch.testing.assert_close(inner(ids).last_hidden_state, expected.last_hidden_state)
        unpatch(inner)(ids)
    with pytest.raises(UnsupportedModelError, match="give the transformers model inside it"):
        patch(nn.Sequential(whole), CONFIG)


def test_what_the_pattern_cannot_say_is_refused() -> None:
    model, ids = patch(_model("llama"), CONFIG), _ids(1, 6)
    with pytest.raises(ConfigurationError, match="between real tokens"):
        model(ids, attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1]]))
    with pytest.raises(UnsupportedModelError, match="packed_sequence"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)
    with pytest.raises(UnsupportedModelError, match="4-D"):
        model(ids, attention_mask=torch.zeros(1, 1, 6, 6))
    with pytest.raises(ConfigurationError, match="3 layers"):
        patch(_model("llama"), TriangleMixConfig(triangle_layer_indices=[7]))
    plain = _model("llama")
    plain.set_attn_implementation("trianglemix")
    with pytest.raises(UnsupportedModelError, match="patch"):
        plain(ids)
