"""Our Python objects as a section of `--additional-config`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.vllm.config import SECTION, ServingConfig

if TYPE_CHECKING:
    from trianglemix.pytorch.config import TriangleMixConfig
    from trianglemix.pytorch.inference_config import TriangleMixInferenceConfig


def additional_config(
    config: TriangleMixConfig | TriangleMixInferenceConfig, num_layers: int
) -> dict[str, dict[str, Any]]:
    """What `LLM(additional_config=...)` takes, for a model of `num_layers` layers.

        LLM(model, additional_config=additional_config(TriangleMixInferenceConfig.for_qwen3(), 40))

    Raises:
        ConfigurationError: no layers, layers the model has not, or block-sparse layers.
    """
    chosen = config.to_trianglemix_config() if hasattr(config, "to_trianglemix_config") else config
    if chosen is None:
        return {SECTION: {"enabled": False}}
    if chosen.block_sparse_layers(num_layers):
        raise ConfigurationError(
            f"block_sparse_layer_indices is {list(chosen.block_sparse_layer_indices)}, but inside "
            "vLLM there are triangle layers only; leave it empty, and those layers are dense"
        )
    layers = frozenset(chosen.triangle_layers(num_layers))
    return {SECTION: ServingConfig(layers, chosen.pattern, "TriangleMixConfig").as_section()}
