"""Our configuration as it lies in vLLM's: the section, the model's shape, the switch."""

from __future__ import annotations

import os
from typing import Any

from trianglemix.exporter.layers.plan import Fingerprint
from trianglemix.vllm.config import ServingConfig, is_enabled, read_config


def configuration(vllm_config: Any) -> ServingConfig | None:
    """What an engine of this `VllmConfig` is to do; None where the plug-in is to do nothing.

    Raises:
        ConfigurationError, ExportError: see `trianglemix.vllm.config`.
    """
    if vllm_config is None or vllm_config.model_config is None:
        return None
    if not is_enabled(vllm_config.additional_config, os.environ):
        return None
    return read_config(vllm_config.additional_config, fingerprint(vllm_config.model_config))


def fingerprint(model_config: Any) -> Fingerprint:
    """The shape of the whole model, all ranks together, by which plans are found."""
    architecture = model_config.model_arch_config
    return Fingerprint(
        num_layers=model_config.get_total_num_hidden_layers(),
        num_heads=architecture.total_num_attention_heads,
        kv_num_heads=architecture.total_num_kv_heads,
        head_size=model_config.get_head_size(),
        hidden_size=model_config.get_hidden_size(),
        vocabulary_size=model_config.get_vocab_size(),
    )
