"""A tiny random model of any causal language model that transformers knows, made from its defaults.

Every size of the family's default configuration is shrunk by the name of its field; lists with an
entry a layer keep one of each kind. What a family needs beyond that stands in `EXTRA`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY: Final = 263
LAYERS: Final = 4
TOKENS: Final = 40
_SEED: Final = 20261127

_SIZES: Final = (
    (r"(.*_)?vocab_size(_.*)?|image_vocab_size|n_vocab", VOCABULARY),
    (r"num_hidden_layers|n_layers?|num_layers|(encoder|decoder)_layers|num_blocks", LAYERS),
    (r".*layers_block_type_period|.*_layer_period|full_attention_interval", 2),
    (r"num_key_value_heads|num_kv_heads|n_kv_heads?|multi_query_group_num", 2),
    (r"(.*_)?num_(attention_|global_)?heads|n_heads?|(encoder_|decoder_)?attention_heads", 4),
    (r"qk_rope_head_dim", 8),
    (r"index_head_dim|.*head_dim|d_kv|.*_head_size|attention_head_dim", 16),
    (r"hidden_size|d_model|n_embd|embed_dim|dim|word_embed_proj_dim|dim_model|emb_dim", 64),
    (r".*(intermediate|expert).*_(size|dim)|ffn_dim|n_inner|dim_ff|d_ff|.*ffn_hidden_size", 96),
    (r"(encoder_|decoder_)ffn_dim|ffn_hidden_size|intermediate_size.*|block_ff_dim|mlp_dim", 96),
    (r".*_lora_rank|.*_rank|lru_width|.*rank_dim|lora_.*dim", 64),
    (r"rotary_dim", 8),
    (r"num_experts_per_tok(en)?|.*top_?k(_experts)?|moe_k", 2),
    (r"(n_|num_)(local_|routed_)?experts|moe_num_experts|num_zero_experts|ffn_num_experts", 4),
    (r"n_groups?|topk_group|num_expert_group|n_shared_experts|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|num_hash_layers", 1),
    (r"sliding_window(_size)?|window_size|attention_window_size|attention_chunk_size", 8),
    (r"max_position_embeddings|n_positions|max_seq_len(gth)?|n_ctx|max_sequence_length", 512),
    (r"(linear|mamba|ssm|conv).*(d_state|state_size)|state_size|mamba_d_state", 16),
    (r"mamba_n_heads|mamba_num_heads|linear_num_(key|value)_heads", 8),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"(mamba_)?chunk_size", 8),
    (r"num_mem_blocks|num_memory_blocks|num_nextn_predict_layers|mtp_.*layers", 1),
)
"""Field name (whole) -> size; only what is larger is shrunk."""
_NOT_GIVEN: Final = {
    *("model_type", "transformers_version", "architectures", "dtype", "torch_dtype", "auto_map"),
    *("_attn_implementation", "attn_implementation", "id2label", "label2id", "return_dict"),
    *("_name_or_path", "output_attentions", "output_hidden_states", "problem_type"),
}
EXTRA: Final[dict[str, dict[str, Any]]] = {
    "bamba": dict(attn_layer_indices=[1, 3]),
    "cohere_compass_text": dict(
        rope_parameters={"full_attention": dict(rope_type="default", rope_theta=1e4)}
    ),
    "deepseek_v2": dict(num_experts_per_tok=2, q_lora_rank=None),
    "dots1": dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1),
    "falcon_h1": dict(mamba_d_ssm=128, mamba_n_heads=8, mamba_d_head=16),
    "gemma3n_text": dict(num_kv_shared_layers=0, activation_sparsity_pattern=[0.0] * 4),
    "gpt_neo": dict(
        attention_types=[[["global", "local"], 2]], attention_layers=["global", "local"] * 2
    ),
    "hunyuan_v1_dense": dict(head_dim=16),
    "hunyuan_v1_moe": dict(head_dim=16, num_experts=4, moe_topk=[2] * 4),
    "inkling_text": dict(swa_num_key_value_heads=2),
    "jamba": dict(attn_layer_offset=1, expert_layer_offset=1),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "longcat_flash": dict(head_dim=8, qk_head_dim=24),
    "mamba2": dict(num_heads=8, head_dim=16),
    "ministral": dict(head_dim=16, layer_types=["sliding_attention", "full_attention"] * 2),
    "nemotron": dict(num_key_value_heads=2),
    "qwen4_exp_text": dict(num_key_value_heads=2),
    "reformer": dict(axial_pos_embds=False),
    "xlnet": dict(d_head=16),
    "xmod": dict(default_language="en_XX"),
}


def families() -> list[str]:
    """Every model type that `AutoModelForCausalLM` knows."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(family: str) -> Any:
    """The model, in eval mode; raises the last error when no choice of sizes runs."""
    last: Exception | None = None
    for kv_heads, head_size in ((2, 16), (4, 16), (4, None)):
        try:
            config = tiny_config(family, kv_heads, head_size)
            torch.manual_seed(_SEED)
            model = AutoModelForCausalLM.from_config(config).eval()
            _disturb(model)
            with torch.no_grad():
                logits = model(torch.arange(3, 3 + TOKENS)[None], use_cache=False).logits
            if not bool(torch.isfinite(logits).all()):
                raise ValueError("its logits are not finite")
            return model
        except Exception as error:  # whatever a family raises: the next choice, or the report
            last = error
    assert last is not None
    raise last


def tiny_config(family: str, kv_heads: int, head_size: int | None) -> Any:
    """The family's default configuration, shrunk."""
    kind = CONFIG_MAPPING[family]
    fields = _shrunk(kind().to_dict(), kv_heads, head_size)
    fields |= EXTRA.get(family, {})
    config = kind(**fields)
    for part in _language_parts(config):
        _keep_full_attention(part)
        if hasattr(part, "is_decoder") and not getattr(part, "is_encoder_decoder", False):
            part.is_decoder = True
    return config


def _language_parts(config: Any) -> Iterator[Any]:
    yield config
    text = config.get_text_config()
    if text is not config:
        yield text


def _shrunk(fields: dict[str, Any], kv_heads: int, head_size: int | None) -> dict[str, Any]:
    layers = next((fields[n] for n in ("num_hidden_layers", "n_layer") if fields.get(n)), None)
    result: dict[str, Any] = {}
    for name, value in fields.items():
        if name in _NOT_GIVEN:
            continue
        if isinstance(value, dict) and "model_type" in value:
            inner = _shrunk(value, kv_heads, head_size)
            result[name] = inner | {"model_type": value["model_type"]}
        elif isinstance(value, dict) and name == "per_layer_config":
            result[name] = {}
        elif isinstance(value, list) and layers is not None and len(value) == layers:
            result[name] = _one_of_each(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            result[name] = _size(name, value, kv_heads, head_size)
        elif name in ("initializer_range", "init_std", "embedding_initializer_range"):
            result[name] = 0.2
        else:
            result[name] = value
    if head_size is None:
        result.pop("head_dim", None)
    return result


def _size(name: str, value: int, kv_heads: int, head_size: int | None) -> int:
    if name.endswith("token_id") or name.endswith("token_index"):
        known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return known.get(name, 250 if value >= VOCABULARY else value)
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, name):
            if (size == 2 and "kv" in name) or "key_value" in name:
                size = kv_heads
            return min(size, value) if value > 0 else value
    return value


def _one_of_each(values: list[Any]) -> list[Any]:
    """`LAYERS` entries in which every kind appears, if there are so few kinds."""
    kinds: list[Any] = []
    for value in values:
        if value not in kinds:
            kinds.append(value)
    return [kinds[n % len(kinds)] for n in range(LAYERS)]


def _keep_full_attention(config: Any) -> None:
    """At least the last layer attends to everything, where a family has such layers."""
    kinds = getattr(config, "layer_types", None)
    if kinds and "full_attention" not in kinds and "sliding_attention" in kinds:
        config.layer_types = [*kinds[:-1], "full_attention"]


def _disturb(model: torch.nn.Module) -> None:
    """Norms and biases start at 1 and 0, where errors hide; so do sinks and the like."""
    for name, tensor in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            tensor.data += 0.2 * torch.randn_like(tensor)
