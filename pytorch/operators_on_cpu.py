"""The operators of `torch.ops.trianglemix` on a CPU: each batch row by torch's own attention.

For tests and for models that are looked at without a GPU; the exported operator is the fast one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch import Tensor
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.pytorch.block_choice import BlockSparse, by_the_rule, choosing_blocks
from trianglemix.pytorch.block_sparse import block_sparse_attention
from trianglemix.pytorch.blocks import Attention, block_attention
from trianglemix.pytorch.cuda_call import Inputs, check_inputs
from trianglemix.pytorch.layout import Rows
from trianglemix.pytorch.operators import NAMESPACE, empty_output, refuse_gradient

_TENSORS: Final = len(Inputs._fields)  # the numbers follow, as the schemas name them
_Run = Callable[[Tensor, Tensor, Tensor, Rows], Tensor]


def _row_by_row(inputs: Inputs, run: _Run) -> Tensor:
    """`run` on each batch row's own keys; zeros where it has none."""
    check_inputs(inputs)
    output = empty_output(inputs.query, inputs.value).zero_()
    lengths = inputs.seqlens_k, inputs.prompt_length, inputs.first_valid
    S, T = inputs.query.shape[2], inputs.key.shape[2]
    for b, (last_key, prompt, first) in enumerate(zip(*(x.tolist() for x in lengths), strict=True)):
        end = last_key + 1
        start, tokens = max(0, end - S), min(S, end)
        if not 0 < end <= T or tokens == 0:
            continue
        q, k, v = (x[b : b + 1] for x in (inputs.query, inputs.key, inputs.value))
        rows = Rows(start, (max(0, first),), (prompt,))
        result = run(q[:, :, :tokens], k[:, :, :end], v[:, :, :end], rows)
        output[b : b + 1, :, :tokens] = result
    return output


def _triangle(*arguments: Any) -> Tensor:
    refuse_gradient("attend_triangle", *arguments[:3])
    sink, window, last, scale, softcap = arguments[_TENSORS:]
    attention = Attention(TrianglePattern(sink, window, last), scale, softcap)
    return _row_by_row(
        Inputs(*arguments[:_TENSORS]),
        lambda q, k, v, rows: block_attention(q, k, v, rows, attention),
    )


def _blocks(*arguments: Any) -> Tensor:
    refuse_gradient("attend_blocks", *arguments[:3])
    sink, window, last, scale, softcap, mass, min_length = arguments[_TENSORS:]
    attention = BlockSparse(BlockRule(mass, min_length, sink, window, last), scale, softcap)
    with choosing_blocks(by_the_rule):
        return _row_by_row(
            Inputs(*arguments[:_TENSORS]),
            lambda q, k, v, rows: block_sparse_attention(q, k, v, rows, attention),
        )


NAMESPACE.impl("trianglemix::attend_triangle", _triangle, "CPU")
NAMESPACE.impl("trianglemix::attend_blocks", _blocks, "CPU")
