"""A Hugging Face folder to analyse: the loaded model, its tokenizer, its shape."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trianglemix.analysis.errors import AnalysisError
from trianglemix.custom_ops.errors import TriangleMixError, first_words
from trianglemix.evaluation.huggingface import (
    fingerprint_of,
    load_causal_model,
    require_torch,
    to_device,
)
from trianglemix.exporter.layers.plan import Fingerprint
from trianglemix.runtime.tokenizer import Tokenizer

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class AnalysedModel:
    """`model` is a transformers causal language model."""

    name: str
    model: Any
    tokenizer: Tokenizer
    fingerprint: Fingerprint

    def check_tokens(self, option: str, tokens: int) -> None:
        """Raises AnalysisError where prompts of so many tokens are beyond the model's context."""
        text = self.model.config.get_text_config()
        limit = getattr(text, "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise AnalysisError(
                f"{option} has {tokens} tokens, but the model's context is {limit}; give fewer"
            )


def load_model(folder: Path, device: str, precision: Precision) -> AnalysedModel:
    """Loads the folder for probing.

    Raises:
        AnalysisError: no causal language model there, or no tokenizer.json.
        MissingPackageError: torch or transformers is not installed.
        WeightsError: the weights are not whole, or not those of the configuration.
    """
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer is None:
        raise AnalysisError(f"{folder} has no tokenizer.json; give a Hugging Face model folder")
    require_torch()
    import torch

    try:
        model = load_causal_model(folder, getattr(torch, precision))
    except TriangleMixError:
        raise
    except Exception as error:  # transformers checks with errors of its packages' own
        raise AnalysisError(
            f"{folder} holds no causal language model: {first_words(error)}"
        ) from error
    to_device(model, device)
    return AnalysedModel(folder.resolve().name, model, tokenizer, fingerprint_of(model.config))


def candidate_layers(config: Any) -> tuple[int, ...]:
    """Layers that see the whole prompt: those with a sliding window of their own are left out."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    return tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention")
