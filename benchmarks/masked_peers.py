"""Other people's attention over a given block mask, each as it wants to be called.

A peer's `prepare` makes its indexes from the mask and returns the call to time. The packages are
imported there: where one is not installed, the import error is the answer.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from trianglemix.custom_ops.block_sparse.contract import TILE

from benchmarks.structured_heads import Keeps

WORKSPACE: Final = 1 << 28  # bytes; FlashInfer's planner keeps several lists of all row blocks


@dataclass(frozen=True)
class Masked:
    """Query `[1, H, S, D]`, key and value `[1, G, S, D]`, mask `[H, C, C]` of blocks of 128.

    S is a multiple of 128, and every block on the diagonal is set.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.query.shape[2]

    def repeated(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value with a copy for every query head."""
        group = self.query.shape[1] // self.key.shape[1]
        return self.key.repeat_interleave(group, 1), self.value.repeat_interleave(group, 1)

    def keeps(self, shared: bool = False, block: int = TILE) -> Keeps:
        """The mask by key; `shared`: head 0's, for every head; `block` 64: as `halved` has it."""
        mask = self.mask[:1] if shared else self.mask
        return functools.partial(_keys_of, mask if block == TILE else halved(mask), block)


def _keys_of(mask: torch.Tensor, block: int, head: int, rows: torch.Tensor) -> torch.Tensor:
    return mask[min(head, len(mask) - 1), rows // block].repeat_interleave(block, -1)


@dataclass(frozen=True)
class Peer:
    """How a peer is called, and in what it differs from the mask of each head, causal inside."""

    prepare: Callable[[Masked], Callable[[], torch.Tensor]]  # the call returns [1, H, S, D]
    causal: bool = True  # False: rows also see later keys of kept blocks
    shared: bool = False  # True: head 0's mask for all heads
    sparse: bool = True
    block: int = TILE
    note: str = ""


def listed(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of set columns `[..., R]`, and their indexes in order first, `[..., R, C]`, int32."""
    order = mask.logical_not().to(torch.uint8).sort(dim=-1, stable=True).indices
    return mask.sum(-1, dtype=torch.int32), order.int().contiguous()


def halved(mask: torch.Tensor) -> torch.Tensor:
    """The same keys in blocks of 64, `[H, 2 C, 2 C]`, less the blocks above the diagonal."""
    return mask.repeat_interleave(2, 1).repeat_interleave(2, 2).tril()


def dense(given: Masked) -> Callable[[], torch.Tensor]:
    """torch's cuDNN attention over all keys."""

    def run() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(
                given.query, given.key, given.value, is_causal=True, enable_gqa=True
            )

    return run


def _causal(b: Any, h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q >= k


def flex_mask(mask: torch.Tensor) -> BlockMask:
    """Of blocks `[H, C, C]`: those below the diagonal whole, those on it causal."""
    diagonal = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device) & mask
    partial, whole = (listed(x[None]) for x in (diagonal, mask & ~diagonal))
    tokens = mask.shape[-1] * TILE
    return BlockMask.from_kv_blocks(
        *partial, *whole, BLOCK_SIZE=TILE, mask_mod=_causal, seq_lengths=(tokens, tokens)
    )


@functools.cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention, dynamic=False)  # type: ignore[return-value]


def flex(given: Masked) -> Callable[[], torch.Tensor]:
    """torch's flex_attention, compiled."""
    blocks = flex_mask(given.mask)
    attention = _compiled_flex()
    return lambda: attention(
        given.query, given.key, given.value, block_mask=blocks, enable_gqa=True
    )


def cudnn_frontend(given: Masked, size: int) -> Callable[[], torch.Tensor]:
    """cuDNN-frontend's block-sparse attention, which has no causal mask; `size` 64 or 128."""
    attention = importlib.import_module(
        "cudnn.block_sparse_attention"
    ).block_sparse_attention_forward
    counts, columns = listed((given.mask if size == TILE else halved(given.mask))[None])

    def run() -> torch.Tensor:
        result: torch.Tensor = attention(
            given.query, given.key, given.value, columns, q2k_block_nums=counts,
            sparse_block_size=size,
        )["o_tensor"]  # fmt: skip
        return result

    return run


def bsr(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask `[C, C]` as row pointers `[C + 1]` and columns, int32."""
    pointers = torch.nn.functional.pad(mask.sum(-1).cumsum(0), (1, 0))
    return pointers.int(), mask.nonzero()[:, 1].int().contiguous()


def _wrapper(name: str) -> Any:
    """A FlashInfer wrapper with workspaces as large as its planner asks for at 128K."""
    made = getattr(importlib.import_module("flashinfer"), name)
    room = [torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda") for _ in range(2)]
    wrapper = made(room[0])
    wrapper.reset_workspace_buffer(*room)
    return wrapper


def flashinfer_shared(given: Masked) -> Callable[[], torch.Tensor]:
    """FlashInfer's BlockSparseAttentionWrapper, which takes one mask for all heads."""
    wrapper = _wrapper("BlockSparseAttentionWrapper")
    query, key, value = (x[0].transpose(0, 1).contiguous() for x in (given.query, given.key,
                                                                     given.value))  # fmt: skip
    S, H, D = query.shape
    wrapper.plan(
        *bsr(given.mask[0]), S, S, TILE, TILE, H, key.shape[1], D, causal=True,
        q_data_type=query.dtype, o_data_type=query.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(query, key, value).transpose(0, 1)[None]


def flashinfer_variable(given: Masked) -> Callable[[], torch.Tensor]:
    """FlashInfer's VariableBlockSparseAttentionWrapper: a mask for each key head, so copied ones.

    Its causal mask aligns the ends of a row block and of its keys, which end with the diagonal.
    """
    wrapper = _wrapper("VariableBlockSparseAttentionWrapper")
    query, (key, value) = given.query[0], (x[0] for x in given.repeated())
    H, S, D = query.shape
    sizes = torch.full((H, S // TILE), TILE, dtype=torch.int32, device=query.device)
    wrapper.plan(given.mask, sizes, sizes, H, H, D, causal=True, q_data_type=query.dtype)
    return lambda: wrapper.run(query, key, value)[None]


PEERS: Final = {
    "cuDNN": Peer(dense, sparse=False, note="dense, torch"),
    "flex": Peer(flex, note="compiled"),
    "cudnn-frontend 128": Peer(
        functools.partial(cudnn_frontend, size=128), causal=False, note="not causal in a block"
    ),
    "cudnn-frontend 64": Peer(
        functools.partial(cudnn_frontend, size=64),
        causal=False,
        block=64,
        note="not causal in a block",
    ),
    "flashinfer": Peer(flashinfer_shared, shared=True, note="head 0's mask for all"),
    "flashinfer variable": Peer(flashinfer_variable, note="K and V copied to every head"),
}
