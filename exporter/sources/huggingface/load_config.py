"""A Hugging Face folder's configuration and weights on their way into transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PretrainedConfig,
)
from trianglemix.custom_ops.errors import TriangleMixError, first_words
from trianglemix.exporter.errors import ExportError, RefusedError
from trianglemix.exporter.sources.huggingface.refusals import ONNX_ROUTE
from trianglemix.exporter.sources.model_config import text_section

_BROKEN_FILES: Final = ("UnpicklingError", "EOFError", "SafetensorError")


def load_config(folder: Path) -> Any:
    """The folder's configuration, whose attention has heads that fit each other.

    Raises:
        ExportError: transformers does not know the model, or the numbers are no model's.
        RefusedError: the model is code of the folder's own, or no causal language model.
    """
    raw, _ = PretrainedConfig.get_config_dict(folder, local_files_only=True)
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING:
        if raw.get("auto_map"):
            raise RefusedError(
                f"the model in {folder} is code of its own (auto_map in config.json), which is "
                f"not run here; {ONNX_ROUTE}"
            )
        raise ExportError(
            f"config.json in {folder} has the model_type {kind!r}, which transformers "
            f"{transformers.__version__} does not know; install a transformers that does, or "
            f"{ONNX_ROUTE}"
        )
    _check_counts(folder, text_section(raw))
    with explained_loading(folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RefusedError(
            f"transformers {transformers.__version__} has no causal language model for the "
            f"model_type {kind!r} of {folder}; if it is one, {ONNX_ROUTE}"
        )
    _check_counts(folder, config.get_text_config().to_dict())  # what the file leaves out, too
    return config


@contextmanager
def explained_loading(folder: Path) -> Iterator[None]:
    """Whatever transformers raises while it loads: the files or their configuration are wrong."""
    try:
        yield
    except TriangleMixError:
        raise
    except Exception as error:  # of its packages' own classes, too
        if type(error).__name__ in _BROKEN_FILES or "PytorchStreamReader" in str(error):
            raise ExportError(
                f"the weights in {folder} cannot be read ({type(error).__name__}): they are "
                "broken, or hold more than weights; download them again, as safetensors"
            ) from error
        raise ExportError(
            f"transformers {transformers.__version__} cannot make the model of {folder}: "
            f"{type(error).__name__}: {first_words(error)}; check the numbers and names in its "
            "config.json, which must be those of the weights"
        ) from error


def _check_counts(folder: Path, config: Mapping[str, Any]) -> None:
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size")
    counts = {name: config[name] for name in names if isinstance(config.get(name), int)}
    for name, count in counts.items():
        if count < 1:
            raise ExportError(
                f"config.json in {folder} says {name} = {count}, but a model has one or more; "
                "take the config.json of the weights"
            )
    heads, shared = counts.get("num_attention_heads", 0), counts.get("num_key_value_heads", 1)
    if heads % shared:
        raise ExportError(
            f"config.json in {folder} says num_key_value_heads = {shared}, which does not divide "
            f"num_attention_heads = {heads}; take the config.json of the weights"
        )
