"""Our Python objects as a section of `--additional-config`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trianglemix.vllm.config import ServingConfig
from trianglemix.vllm.section_values import SECTION

if TYPE_CHECKING:
    from trianglemix.pytorch.config import TriangleMixConfig
    from trianglemix.pytorch.inference_config import TriangleMixInferenceConfig


def additional_config(
    config: TriangleMixConfig | TriangleMixInferenceConfig, num_layers: int
) -> dict[str, dict[str, Any]]:
    """What `LLM(additional_config=...)` takes, for a model of `num_layers` layers.

        LLM(model, additional_config=additional_config(TriangleMixInferenceConfig.for_qwen3(), 40))

    Raises:
        ConfigurationError: no layers, layers the model has not, or a layer that has two roles.
    """
    chosen = config.to_trianglemix_config() if hasattr(config, "to_trianglemix_config") else config
    if chosen is None:
        return {SECTION: {"enabled": False}}
    served = ServingConfig(
        frozenset(chosen.triangle_layers(num_layers)),
        chosen.pattern,
        "TriangleMixConfig",
        frozenset(chosen.block_sparse_layers(num_layers)),
        chosen.block_rule,
    )
    return {SECTION: served.as_section()}
