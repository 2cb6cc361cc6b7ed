"""Tiny random models of every family, as the Hugging Face folders that the routes read.

They are written by transformers 4.57 (the optimum environment), so that `config.json` is spelled
as in the folders that people have; transformers 5 reads it too. No two sizes are equal where a
mix-up could hide, and window, softcap and scale differ from every default.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

SEED: Final = 20261122
WINDOW: Final = 24
VOCABULARY: Final = 263

_SIZES: Final[dict[str, Any]] = dict(
    vocab_size=VOCABULARY, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=2048,
    initializer_range=0.25, bos_token_id=256, eos_token_id=257, pad_token_id=258,
    tie_word_embeddings=False,
)  # fmt: skip
_GEMMA: Final = dict(
    sliding_window=WINDOW, query_pre_attn_scalar=24, initializer_range=0.1, tie_word_embeddings=True
)
_MOE: Final = dict(num_experts_per_tok=2, intermediate_size=40)

FAMILIES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "llama": ("llama", _SIZES),
    "llama-32": ("llama", _SIZES | dict(num_hidden_layers=32)),
    "smollm": ("llama", _SIZES | dict(  # three query heads for each of three key/value heads
        hidden_size=144, num_attention_heads=9, num_key_value_heads=3,
        initializer_range=0.15, tie_word_embeddings=True, num_hidden_layers=4)),
    "qwen2": ("qwen2", _SIZES),
    "qwen3": ("qwen3", _SIZES),
    "mistral": ("mistral", _SIZES | dict(sliding_window=None)),  # from v0.2 on
    "mistral-v0.1": ("mistral", _SIZES | dict(sliding_window=WINDOW)),  # every layer slides
    "phi3": ("phi3", {k: v for k, v in _SIZES.items() if k != "head_dim"} | dict(
        hidden_size=64, sliding_window=None,
        original_max_position_embeddings=2048)),  # not LongRoPE: genai's builder tells by this
    "gemma2": ("gemma2", _SIZES | _GEMMA | dict(
        attn_logit_softcapping=5.0, final_logit_softcapping=6.0)),
    "gemma3": ("gemma3_text", _SIZES | _GEMMA | dict(
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        sliding_window_pattern=3)),
    "gpt2": ("gpt2", dict(
        vocab_size=VOCABULARY, n_embd=64, n_inner=80, n_layer=3, n_head=4, n_positions=2048,
        initializer_range=0.25, bos_token_id=256, eos_token_id=257, pad_token_id=258)),
    "qwen3_moe": ("qwen3_moe", _SIZES | _MOE | dict(
        num_experts=5, moe_intermediate_size=40, decoder_sparse_step=1)),
    "mixtral": ("mixtral", _SIZES | _MOE | dict(num_local_experts=5, sliding_window=None)),
}  # fmt: skip


def save_folder(family: str, folder: Path) -> None:
    """Writes the family's model and tokenizer into `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from source_models.tiny_tokenizer import save_tokenizer

    kind, sizes = FAMILIES[family]
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    for name, tensor in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # they start at 0 and 1, where errors hide
            tensor.data += 0.2 * torch.randn_like(tensor)
    model.save_pretrained(folder)
    save_tokenizer(folder)


def make(job: str, folder: Path, target: Path) -> None:
    """`folder` is not read: this is where folders come from."""
    save_folder(target.name.split("~")[0], target)


if __name__ == "__main__":
    from source_models.routes.worker import work

    sys.exit(work(make))
