"""Tiny random LLMs as Hugging Face folders and as ONNX files, made on demand under `build/`.

    model = tiny_model("llama", "dynamo-sdpa-20")   # model.path, model.folder, model.num_layers ...

All routes of one family carry the same weights, so their numbers can be compared. Every size
differs from every other: a mix-up of two axes cannot pass unnoticed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from source_models.model_cache import BUILD, cached_folder, copy_companions
from source_models.plain_onnx import PlainExport, export_plain
from source_models.tiny_tokenizer import VOCABULARY_SIZE, save_tokenizer
from tests.tiny_gqa import build_gqa

CACHE: Final = BUILD / "tiny_models"
SEED: Final = 20261122
_PACKAGES: Final = ("torch", "transformers")
_RECIPE: Final = 1  # raise it when what is made here changes

ONNX_FAMILIES: Final = ("llama", "qwen2", "qwen3")
FOLDER_FAMILIES: Final = (*ONNX_FAMILIES, "mistral", "phi3", "gemma2", "gpt2")
PLAIN_ROUTES: Final = {
    "dynamo-sdpa-18": PlainExport("dynamo", "sdpa", 18),
    "dynamo-sdpa-20": PlainExport("dynamo", "sdpa", 20),
    "dynamo-eager-20": PlainExport("dynamo", "eager", 20),
    "torchscript-18": PlainExport("torchscript", "sdpa", 18),
}
GQA_ROUTE: Final = "gqa"
"""`com.microsoft::GroupQueryAttention` with RoPE inside, as genai's model builder writes it."""
ROUTES: Final = (*PLAIN_ROUTES, GQA_ROUTE)
PAIRS: Final = (
    *(("llama", route) for route in ROUTES),
    *(("qwen2", route) for route in ("dynamo-eager-20", "torchscript-18", GQA_ROUTE)),
    *(("qwen3", route) for route in ("dynamo-sdpa-20", "torchscript-18", GQA_ROUTE)),
)
"""What tests run over: each dynamo export takes about 9 s the first time, so not all pairs."""

_SIZES: Final[dict[str, Any]] = dict(
    vocab_size=VOCABULARY_SIZE,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=2048,
    initializer_range=0.25,
    bos_token_id=256,
    eos_token_id=257,
    pad_token_id=258,
    tie_word_embeddings=False,
)


@dataclass(frozen=True)
class TinyModel:
    """One ONNX file (`path`, external data beside it) and the folder it was made from."""

    family: str
    route: str
    path: Path
    folder: Path
    num_layers: int = 3
    num_heads: int = 4
    kv_num_heads: int = 2
    head_size: int = 16
    vocab_size: int = VOCABULARY_SIZE

    @property
    def has_position_ids(self) -> bool:
        """Whether the graph takes position_ids (GroupQueryAttention counts for itself)."""
        return self.route != GQA_ROUTE


def tiny_model(family: str = "llama", route: str = "dynamo-sdpa-20") -> TinyModel:
    """The ONNX model of `ONNX_FAMILIES` by `ROUTES`, from the cache or made now (seconds)."""
    assert family in ONNX_FAMILIES, f"{family} is not one of {ONNX_FAMILIES}"
    source = tiny_folder(family)

    def make(target: Path) -> None:
        path = target / "model.onnx"
        if route == GQA_ROUTE:
            build_gqa(source, path)
        else:
            export_plain(source, path, PLAIN_ROUTES[route])
        copy_companions(source, target)

    folder = cached_folder(
        CACHE, f"{family}-{route}-r{_RECIPE}", (*_PACKAGES, "onnx-ir", "onnxscript"), make
    )
    return TinyModel(family, route, folder / "model.onnx", source)


def tiny_folder(family: str = "llama") -> Path:
    """The Hugging Face folder of one of `FOLDER_FAMILIES`: random weights, a byte tokenizer."""
    return cached_folder(
        CACHE,
        f"{family}-folder-r{_RECIPE}",
        _PACKAGES,
        lambda target: _save_folder(family, target),
    )


def _save_folder(family: str, target: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **_config(family)))
    for name, tensor in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # they start at 0 and 1, where errors hide
            tensor.data += 0.2 * torch.randn_like(tensor)
    model.save_pretrained(target)
    save_tokenizer(target)


def _config(family: str) -> dict[str, Any]:
    """The sizes above in the family's own spelling; sliding windows only where they belong."""
    sizes = dict(_SIZES)
    if family == "gpt2":
        return dict(
            vocab_size=VOCABULARY_SIZE, n_embd=64, n_inner=80, n_layer=3, n_head=4,
            n_positions=2048, initializer_range=0.25,
            bos_token_id=256, eos_token_id=257, pad_token_id=258,
        )  # fmt: skip
    if family == "phi3":  # no head_dim of its own
        sizes |= dict(hidden_size=64, sliding_window=None)
        del sizes["head_dim"]
    if family == "mistral":
        sizes |= dict(sliding_window=None)
    if family == "gemma2":  # every second layer slides
        sizes |= dict(
            sliding_window=24, query_pre_attn_scalar=24, attn_logit_softcapping=5.0,
            final_logit_softcapping=6.0, initializer_range=0.1,
        )  # fmt: skip
    return sizes
