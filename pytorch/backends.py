"""Which code runs the pattern on which device; an NPU registers itself when torch_npu is here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Final

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from trianglemix.pytorch.blocks import Attention, block_attention
from trianglemix.pytorch.cuda_backend import beats_sdpa, kernel_triangle, why_not_kernels
from trianglemix.pytorch.flex import flex_triangle
from trianglemix.pytorch.layout import Rows

logger = logging.getLogger(__name__)

Backend = Callable[[Tensor, Tensor, Tensor, Rows, Attention], Tensor]
"""`query [B, H, S, D]`, `key [B, G, T, D]`, `value [B, G, T, Dv]` -> `[B, H, S, Dv]`."""

_FLEX_MIN_ROWS: Final = 256
"""Below it (decoding, short chunks) a compiled kernel gains nothing."""


def triangle_attention(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, attention: Attention
) -> Tensor:
    """Runs the pattern on the tensors' device, in O(N) memory; shapes as `Backend`."""
    if _is_plain_causal(query, key, rows, attention) and not beats_sdpa(query, key, value):
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=attention.scale, enable_gqa=True
        )
    backend = BACKENDS.get(query.device.type, block_attention)
    return backend(query, key, value, rows, attention)


def _is_plain_causal(query: Tensor, key: Tensor, rows: Rows, attention: Attention) -> bool:
    """Whether nothing is dropped and SDPA has a flash kernel for what is left."""
    exact = attention.pattern.exact_length
    keeps_all = exact is None or all(n <= exact for n in rows.prompt_length)
    whole = rows.start == 0 and query.shape[2] == key.shape[2] and not any(rows.first_valid)
    return keeps_all and whole and not attention.softcap and query.device.type in ("cpu", "cuda")


def flex_takes(query: Tensor, value: Tensor) -> bool:
    """Whether flex_attention has a kernel for these sizes, and gains by it."""
    D, Dv = query.shape[3], value.shape[3]
    power_of_two = Dv == D and D & (D - 1) == 0
    return query.shape[2] >= _FLEX_MIN_ROWS and power_of_two


def _cuda(query: Tensor, key: Tensor, value: Tensor, rows: Rows, attention: Attention) -> Tensor:
    if why_not_kernels(query, key, value) is None:
        return kernel_triangle(query, key, value, rows, attention)
    run = flex_triangle if flex_takes(query, value) else block_attention
    return run(query, key, value, rows, attention)


BACKENDS: Final[dict[str, Backend]] = {"cuda": _cuda}
"""By device type; a device that is not named runs `block_attention`."""

if find_spec("torch_npu") is not None:
    from trianglemix.pytorch.npu import npu_attention

    BACKENDS["npu"] = npu_attention
    logger.info("torch_npu found: triangle layers on Ascend NPUs use npu_fusion_attention")
