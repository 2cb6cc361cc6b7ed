"""The pattern inside PyTorch and transformers, and the reference card's Python API."""

import trianglemix.pytorch.operators_on_cpu  # noqa: F401 (torch.ops.trianglemix)
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.pytorch.ascend import AscendNPUTriangleMixOptimizer, AscendTriangleMixAttention
from trianglemix.pytorch.attention_call import UnsupportedModelError
from trianglemix.pytorch.block_choice import choosing_blocks
from trianglemix.pytorch.config import TriangleMixConfig
from trianglemix.pytorch.inference_config import TriangleMixInferenceConfig
from trianglemix.pytorch.layout import prompt_length
from trianglemix.pytorch.masks import TriangleMixMaskGenerator
from trianglemix.pytorch.patch import patch, register, unpatch

__all__ = [
    "AscendNPUTriangleMixOptimizer",
    "AscendTriangleMixAttention",
    "BlockRule",
    "TriangleMixConfig",
    "TriangleMixInferenceConfig",
    "TriangleMixMaskGenerator",
    "UnsupportedModelError",
    "choosing_blocks",
    "patch",
    "prompt_length",
    "register",
    "unpatch",
]
