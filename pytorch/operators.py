"""The operators under `torch.ops.trianglemix`: attention to keys that are in the cache already.

`attend_triangle` and `attend_blocks` append nothing and rotate nothing, so PyTorch's own caches
stay what they are. On CUDA they run the library's kernels; `operators_on_cpu` has them in plain
torch. They have no gradient.

    attend_triangle(query, key, value, seqlens_k, prompt_length, first_valid,
                    num_sink_tokens, sliding_window_size, num_last_tokens, scale, softcap)

`query [B, H, S, D]`, `key [B, G, T, D]`, `value [B, G, T, Dv]` -> `[B, H, S, Dv]`, which lies in
memory as `[B, S, H, Dv]`. The three lengths are int32 `[B]` on the same device: the end of the
row's keys minus one, the prompt's length N and the row's first key. New token `s` of a row has
position `max(0, end - S) + s`; tokens outside its keys give zeros. `softcap` 0 is none.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from trianglemix.custom_ops.errors import TriangleMixError
from trianglemix.pytorch.cuda_call import Inputs, run_kernels

_torch_library: Any = torch.library  # whose functions have no types
NAMESPACE: Final[Any] = _torch_library.Library("trianglemix", "FRAGMENT")
_TENSORS: Final = (
    "Tensor query, Tensor key, Tensor value, Tensor seqlens_k, Tensor prompt_length, "
    "Tensor first_valid"
)
_PATTERN: Final = (
    "int num_sink_tokens, int sliding_window_size, int num_last_tokens, float scale, float softcap"
)
NAMESPACE.define(
    f"attend_triangle({_TENSORS}, {_PATTERN}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
NAMESPACE.define(
    f"attend_blocks({_TENSORS}, {_PATTERN}, float mass, int min_length) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operators: Any = torch.ops.trianglemix
attend_triangle: Final[Any] = _operators.attend_triangle.default
attend_blocks: Final[Any] = _operators.attend_blocks.default


class NoGradientError(TriangleMixError, RuntimeError):
    """An operator was asked for a gradient, which it has not."""


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """`[B, H, S, Dv]` that lies in memory as `[B, S, H, Dv]`, its numbers not set."""
    B, H, S, _ = query.shape
    return query.new_empty(B, S, H, value.shape[3]).transpose(1, 2)


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return empty_output(query, value)


def _triangle_on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seqlens_k: Tensor,
    prompt_length: Tensor,
    first_valid: Tensor,
    sink: int,
    window: int,
    last: int,
    scale: float,
    softcap: float,
) -> Tensor:
    numbers = {"sink": sink, "window": window, "last": last, "scale": scale, "softcap": softcap}
    inputs = Inputs(query, key, value, seqlens_k, prompt_length, first_valid)
    return run_kernels("triangle", inputs, numbers)


def _blocks_on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seqlens_k: Tensor,
    prompt_length: Tensor,
    first_valid: Tensor,
    sink: int,
    window: int,
    last: int,
    scale: float,
    softcap: float,
    mass: float,
    min_length: int,
) -> Tensor:
    numbers = {"sink": sink, "window": window, "last": last, "scale": scale, "softcap": softcap}
    numbers |= {"mass": mass, "min_length": min_length}
    inputs = Inputs(query, key, value, seqlens_k, prompt_length, first_valid)
    return run_kernels("block_sparse", inputs, numbers)


def _refusing_gradients(operator: Any) -> Any:
    private: Any = torch._C
    below = private._AutoDispatchBelowAutograd

    def run(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
        if torch.is_grad_enabled() and (
            query.requires_grad or key.requires_grad or value.requires_grad
        ):
            raise NoGradientError(
                f"torch.ops.{operator.name().replace('::', '.')} has no gradient, but its queries, "
                "keys or values require one; call it under torch.no_grad(), or train with "
                "flex_attention"
            )
        with below():
            result: Tensor = operator(query, key, value, *others)
        return result

    return run


for _operator, _on_cuda in (
    (attend_triangle, _triangle_on_cuda),
    (attend_blocks, _blocks_on_cuda),
):
    _name = _operator.name()
    _torch_library.register_fake(_name, _fake, lib=NAMESPACE)
    NAMESPACE.impl(_name, _on_cuda, "CUDA")
    NAMESPACE.impl(_name, _refusing_gradients(_operator), "Autograd")
