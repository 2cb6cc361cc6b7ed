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
from trianglemix.pytorch.cuda_call import Inputs, call_kernels

_torch_library: Any = torch.library  # whose functions have no types
NAMESPACE: Final[Any] = _torch_library.Library("trianglemix", "FRAGMENT")
_TENSORS: Final = Inputs._fields
_PATTERN: Final = (
    "int num_sink_tokens, int sliding_window_size, int num_last_tokens, float scale, float softcap"
)
_ARGUMENTS: Final = ", ".join((*(f"Tensor {name}" for name in _TENSORS), _PATTERN))
NAMESPACE.define(f"attend_triangle({_ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
NAMESPACE.define(
    f"attend_blocks({_ARGUMENTS}, float mass, int min_length) -> Tensor",
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


def refuse_gradient(name: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises NoGradientError where operator `name` is called on tensors that require a gradient.

    Each kernel asks, and so no step stands before it in torch's dispatcher.
    """
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    ):
        raise NoGradientError(
            f"torch.ops.trianglemix.{name} has no gradient, but its queries, keys or values "
            "require one; call it under torch.no_grad(), or train with flex_attention"
        )


def _fake(name: str) -> Any:
    def run(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
        refuse_gradient(name, query, key, value)
        return empty_output(query, value)

    return run


def _on_cuda(name: str, kind: str) -> Any:
    def run(  # type: ignore[no-untyped-def]
        query, key, value, end, prompt, first, *numbers
    ) -> Tensor:
        refuse_gradient(name, query, key, value)
        return call_kernels(kind, query, key, value, end, prompt, first, numbers)

    return run


for _name, _kind in (("attend_triangle", "triangle"), ("attend_blocks", "block_sparse")):
    _torch_library.register_fake(f"trianglemix::{_name}", _fake(_name), lib=NAMESPACE)
    NAMESPACE.impl(_name, _on_cuda(_name, _kind), "CUDA")
