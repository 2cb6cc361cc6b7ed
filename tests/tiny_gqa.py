"""Tiny models with `com.microsoft::GroupQueryAttention`, in the style of genai's model builder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from trianglemix.custom_ops.arrays import Array

from source_models.genai_graph import Decoder, build_decoder


class _Checkpoint:
    """The float32 tensors of a Hugging Face folder."""

    def __init__(self, folder: Path) -> None:
        from safetensors.numpy import load_file

        self._tensors: dict[str, Array] = load_file(folder / "model.safetensors")

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def stored(self, name: str) -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(self._tensors[name]), name=name)

    def joined(self, name: str, parts: Sequence[str]) -> ir.TensorProtocol:
        joined = np.concatenate([self._tensors[part].T for part in parts], axis=-1)
        return ir.tensor(np.ascontiguousarray(joined), name=name)

    def table(self, name: str, array: Array) -> ir.TensorProtocol:
        return ir.tensor(array.astype(np.float32), name=name)


def build_gqa(folder: Path, path: Path) -> None:
    """Writes the Llama, Qwen2 or Qwen3 model of a Hugging Face folder as a genai-style graph."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = build_decoder(_decoder(config), _Checkpoint(folder))
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path, external_data=f"{path.name}.data")


def _decoder(config: dict[str, Any]) -> Decoder:
    rope = config.get("rope_parameters") or config  # transformers 5 and 4 write it differently
    heads = config["num_attention_heads"]
    return Decoder(
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config["num_key_value_heads"],
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        vocabulary=config["vocab_size"],
        positions=config["max_position_embeddings"],
        epsilon=config["rms_norm_eps"],
        rope_theta=rope["rope_theta"],
        dtype=ir.DataType.FLOAT,
    )
