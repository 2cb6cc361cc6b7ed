"""A model whose attention cannot be replaced is refused by its class, and left as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from trianglemix.analysis.gradients import probe
from trianglemix.analysis.sections import ProbeSample
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.evaluation.huggingface import HuggingFaceModel, HuggingFaceOptions
from trianglemix.pytorch import TriangleMixConfig, UnsupportedModelError, patch, unpatch

from source_models.tiny_tokenizer import save_tokenizer
from tests.tiny_models import tiny_folder

CONFIG = TriangleMixConfig(2, 8, 4, triangle_layer_indices=[1])
GPT2_LIKE = dict(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=256)
BERT_LIKE = dict(vocab_size=259, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
LLAMA_LIKE = BERT_LIKE | dict(num_key_value_heads=2, intermediate_size=40)
XGLM = dict(vocab_size=259, d_model=32, num_layers=2, attention_heads=4, ffn_dim=40)
BART = dict(vocab_size=259, d_model=32, encoder_layers=2, decoder_layers=2)
BART |= dict(encoder_attention_heads=4, decoder_attention_heads=4)
BART |= dict(encoder_ffn_dim=40, decoder_ffn_dim=40)
OWN_CODE: dict[str, dict[str, Any]] = {
    "gptj": GPT2_LIKE | dict(rotary_dim=8),
    "codegen": GPT2_LIKE | dict(rotary_dim=8),
    "gpt_neo": dict(vocab_size=259, hidden_size=32, num_layers=2, num_heads=4, window_size=8)
    | dict(attention_types=[[["global", "local"], 1]]),
    "falcon": BERT_LIKE,
    "bloom": dict(vocab_size=259, hidden_size=32, n_layer=2, n_head=4),
    "mpt": dict(vocab_size=259, d_model=32, n_layers=2, n_heads=4),
    "xglm": XGLM,
}


def tiny(family: str, **sizes: Any) -> Any:
    torch.manual_seed(3)
    sizes = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2) | sizes
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()


def logits(model: Any, length: int = 40) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(torch.arange(3, 3 + length)[None], use_cache=False).logits
    return result


@pytest.mark.parametrize("family", OWN_CODE)
def test_attention_of_a_models_own_code_is_refused_by_its_class(family: str) -> None:
    model = tiny(family, **OWN_CODE[family])
    before, settings = logits(model), model.config.to_dict()
    with pytest.raises(UnsupportedModelError, match="does not call transformers") as caught:
        patch(model, CONFIG)
    assert type(model).__name__ in str(caught.value)
    advice = "ALiBi" if family in ("bloom", "mpt") else "export its ONNX file"
    assert advice in str(caught.value)
    assert model.config.to_dict() == settings
    assert "generate" not in model.__dict__
    assert torch.equal(logits(model), before)


def test_the_probe_and_the_evaluation_refuse_it_too(tmp_path: Any) -> None:
    model = tiny("gptj", **OWN_CODE["gptj"])
    with pytest.raises(UnsupportedModelError, match="GPTJForCausalLM does not call"):
        probe(model, ProbeSample(tuple(range(3, 43)), 7), TrianglePattern(2, 8, 4))
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(UnsupportedModelError, match="GPTJForCausalLM does not call"):
        HuggingFaceModel(tmp_path, HuggingFaceOptions(triangle_layers=[1]))


def test_a_hybrid_model_takes_its_attention_layers_only() -> None:
    sizes = LLAMA_LIKE | dict(num_hidden_layers=4, block_ff_dim=40)
    sizes["layer_types"] = ["conv", "full_attention"] * 2
    wide = TriangleMixConfig(0, 1000, 1, triangle_layer_indices=[1])
    model = tiny("lfm2", **sizes)
    before = logits(model)
    torch.testing.assert_close(logits(patch(model, wide)), before)
    with pytest.raises(UnsupportedModelError, match="layer 0 of Lfm2ForCausalLM is conv"):
        patch(model, TriangleMixConfig(triangle_layer_indices=[0]))
    figures = probe(model, ProbeSample(tuple(range(3, 43)), 7), TrianglePattern(2, 8, 4))
    assert figures.mean_abs[0] == [0, 0, 0]
    assert min(figures.mean_abs[1]) > 0


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("gpt_oss", dict(head_dim=8, num_local_experts=2), "GptOssAttention hands s_aux"),
        ("llama4_text", dict(head_dim=8, num_local_experts=2, no_rope_layers=[1, 0]), "chunk"),
    ],
)
def test_attention_of_another_kind_says_which(
    family: str, sizes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        patch(tiny(family, **(LLAMA_LIKE | sizes)), CONFIG)


def test_an_encoder_decoder_model_is_refused() -> None:
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("bart", **BART))
    with pytest.raises(UnsupportedModelError, match=r"BartForCond.* encoder-decoder"):
        patch(model, CONFIG)


def without_mask(attention: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*arguments: Any, **given: Any) -> Any:
        return attention(*arguments, **(given | {"attention_mask": None}))

    return forward


def with_bias(attention: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*arguments: Any, **given: Any) -> Any:
        return attention(*arguments, **(given | {"attention_bias": torch.ones(1)}))

    return forward


@pytest.mark.parametrize(
    ("wrapper", "message"), [(without_mask, "without a mask"), (with_bias, "attention_bias")]
)
def test_calls_that_the_pattern_does_not_know_are_refused(
    wrapper: Callable[..., Any], message: str
) -> None:
    model = tiny("llama", **LLAMA_LIKE)
    attention = model.model.layers[1].self_attn
    attention.forward = wrapper(attention.forward)
    with pytest.raises(UnsupportedModelError, match=rf"LlamaAttention .*{message}"):
        patch(model, CONFIG)


def test_what_only_the_models_own_function_computes_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Attention whose meaning lies in its own function, not in what it hands over."""
    model = tiny("llama", **LLAMA_LIKE)
    code = sys.modules[type(model).__module__]
    own = code.eager_attention_forward

    def biased(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **given: Any):  # type: ignore[no-untyped-def]
        distance = torch.arange(key.shape[2]) - torch.arange(query.shape[2])[:, None]
        return own(module, query, key, value, mask + 0.1 * distance, **given)

    monkeypatch.setattr(code, "eager_attention_forward", biased)
    with pytest.raises(UnsupportedModelError, match=r"LlamaAttention \(layer 0\) computes"):
        patch(model, CONFIG)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_large_scores_in_half_precision_are_no_other_kind_of_attention(dtype: torch.dtype) -> None:
    """Eager attention rounds its scores to the model's type: at 100 they are off by 0.25."""
    model = tiny("llama", **LLAMA_LIKE).to(dtype)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 100
        layer.self_attn.k_proj.weight.data *= 100
    patch(model, CONFIG)
    assert bool(torch.isfinite(logits(model)).all())


def test_a_model_without_weights_says_what_to_do() -> None:
    with torch.device("meta"):
        model = tiny("llama", **LLAMA_LIKE)
    with pytest.raises(UnsupportedModelError, match=r"embed_tokens.* load them first"):
        patch(model, CONFIG)
    model = tiny("llama", **LLAMA_LIKE)
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp.* is on the meta device"):
        patch(model, CONFIG)


def test_weights_that_each_call_brings_along_are_no_missing_ones(tmp_path: Any) -> None:
    """accelerate keeps them elsewhere, and the parameters on the meta device."""
    tiny("llama", **LLAMA_LIKE).save_pretrained(tmp_path)
    places = dict.fromkeys(("model.embed_tokens", "model.layers.1", "lm_head"), "disk")
    places |= dict.fromkeys(("model.layers.0", "model.norm", "model.rotary_emb"), "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "disk"
    )
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.get_input_embeddings().weight.is_meta
    torch.testing.assert_close(logits(patch(model, CONFIG)), logits(patch(whole, CONFIG)))


def test_two_stacks_with_the_same_numbers_are_refused() -> None:
    model = tiny("llama", **LLAMA_LIKE)
    model.model.layers[0].self_attn.layer_idx = 1
    with pytest.raises(UnsupportedModelError, match="2 attention modules numbered 1"):
        patch(model, CONFIG)


def test_the_mask_says_which_layers_slide_whatever_they_hand_over() -> None:
    """gemma2 slides in layer 0; a layer that did not hand its window over would be dense."""
    model = AutoModelForCausalLM.from_pretrained(
        tiny_folder("gemma2"), attn_implementation="eager"
    ).eval()
    before = logits(model, 80)
    wide = TriangleMixConfig(0, 1000, 1, triangle_layer_indices=[1])
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    torch.testing.assert_close(logits(patch(model, wide), 80), before, atol=2e-4, rtol=1e-4)


def test_a_failed_patch_leaves_a_patched_model_patched_and_unpatch_still_restores() -> None:
    model = tiny("llama", **LLAMA_LIKE)
    model.set_attn_implementation("eager")
    before = logits(model)
    model.train()
    patch(model, CONFIG)
    assert model.training
    model.eval()
    cut = logits(model)
    assert (cut - before).abs().max() > 1e-3
    attention = model.model.layers[0].self_attn
    forward, attention.forward = attention.forward, without_mask(attention.forward)
    with pytest.raises(UnsupportedModelError):
        patch(model, TriangleMixConfig(triangle_layer_indices=[0]))
    attention.forward = forward
    assert torch.equal(logits(model), cut)
    assert torch.equal(logits(unpatch(model)), before)
    assert model.config._attn_implementation == "eager"
