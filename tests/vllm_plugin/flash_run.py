"""The CUDA backend over a version's own Python files, its kernels in PyTorch: run by test_flash.py.

    PYTHONPATH=FILES python flash_run.py SEED

Builder, metadata and the dense forward are vLLM's own code; only what needs a GPU stands in.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.pytorch.cuda_backend import kernel_blocks
from trianglemix.vllm import cuda, paged_blocks, sparse_segments
from trianglemix.vllm.errors import ServingError
from trianglemix.vllm.roles import Keeps, role_of
from trianglemix.vllm.row_split import Request
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.vllm_plugin import flash_stand_in as stand_in
from tests.vllm_plugin.test_step import FullAttentionSpec, engine

STEPS = 120
BLOCK_STEPS = 60
NAMES = [f"model.layers.{n}.self_attn.attn" for n in range(3)]


def _builder_init(self: Any, spec: Any, names: list[str], config: Any, device: Any) -> None:
    """What the builder's own beginning would set on one GPU without graphs."""
    self.__dict__ |= {
        "kv_cache_spec": spec, "vllm_config": config, "device": device,
        "model_config": config.model_config, "cache_config": SimpleNamespace(cache_dtype="auto"),
        "block_size": stand_in.PAGE, "kv_cache_dtype": torch.float32,
        "max_num_splits": 0, "aot_schedule": False,
        "dcp_world_size": 1, "dcp_rank": 0, "cp_kv_cache_interleave_size": 1,
        "use_full_cuda_graph": False, "max_cudagraph_size": None, "aot_sliding_window": (-1, -1),
        "rswa_window": None, "fa4_hd256": False, "mm_prefix_query_ranges_cpu": None,
    }  # fmt: skip


def _attention() -> Any:
    """An attention of ours with what vLLM's own `__init__` would set."""
    made = object.__new__(cuda.TriangleFlashImpl)
    made.__dict__ |= {
        "num_heads": stand_in.H, "num_kv_heads": stand_in.G, "head_size": stand_in.D,
        "scale": stand_in.SCALE, "logits_soft_cap": 0, "vllm_flash_attn_version": 3,
        "attn_type": "decoder", "sliding_window": (-1, -1), "alibi_slopes": None, "sinks": None,
        "kv_cache_dtype": "auto", "batch_invariant_enabled": False, "dcp_world_size": 1,
        "supports_quant_query_input": False, "fa4_hd256": False,
    }  # fmt: skip
    return made


def _requests(numbers: random.Random, longest: int) -> list[Request]:
    made, begin = [], 0
    for _ in range(numbers.choice([1, 1, 2, 3, 5])):
        length = numbers.randrange(1, longest)
        tokens = numbers.choice([length, length + numbers.randrange(1, 4),
                                 numbers.randrange(1, length + 1)])  # fmt: skip
        rows = numbers.choice([1, tokens, numbers.randrange(0, tokens + 1)])
        made.append(Request(begin, begin + rows, tokens, length))
        begin += rows
    return made


def _common(requests: list[Request], table: torch.Tensor) -> CommonAttentionMetadata:
    starts = torch.tensor([0, *(r.end for r in requests)], dtype=torch.int32)
    tokens = torch.tensor([r.tokens for r in requests], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=tokens,
        num_reqs=len(requests), num_actual_tokens=int(starts[-1]),
        max_query_len=max(r.end - r.begin for r in requests), max_seq_len=int(tokens.max()),
        block_table_tensor=table, slot_mapping=torch.arange(int(starts[-1])),
        seq_lens_cpu_upper_bound=tokens + 0,
        rswa_prefix_lens=torch.tensor([r.prompt_length for r in requests], dtype=torch.int32),
    )  # fmt: skip


def _spec(dtype: torch.dtype = torch.float16) -> FullAttentionSpec:
    spec = FullAttentionSpec()
    spec.dtype, spec.block_size, spec.head_size = dtype, stand_in.PAGE, stand_in.D
    return spec


def _engine(keeps: Keeps) -> Any:
    config = engine(keeps)
    modules = config.compilation_config.static_forward_context
    for name in NAMES:
        scales = {f"_{x}_scale": torch.ones(1) for x in "qkv"}
        modules[name] = SimpleNamespace(impl=_attention(), layer_name=name, **scales)
    return config


def _check(requests: list[Request], keeps: Keeps, seed: int) -> bool:
    """One step through a layer with a role and a dense one; whether rows were ours."""
    batch = stand_in.random_batch(requests, keeps, seed)
    config = _engine(keeps)
    modules = config.compilation_config.static_forward_context
    builder = cuda.TriangleFlashBuilder(_spec(), NAMES, config, torch.device("cpu"))
    assert builder.supports_update_block_table is False
    metadata = builder.build(0, _common(requests, batch.table))
    key = torch.zeros(len(batch.query), stand_in.G, stand_in.D)
    for name, right in ((NAMES[1], batch.expected), (NAMES[0], batch.dense)):
        output = torch.full_like(batch.query, float("nan"))
        given = (batch.query, key, key, batch.cache, metadata, output)
        modules[name].impl.forward(modules[name], *given)
        torch.testing.assert_close(output.double(), right.double(), rtol=0, atol=3e-6)
    return role_of(keeps) in metadata.trianglemix


def _check_warning() -> None:
    """Pages that are gathered although larger ones would be read in place."""
    for keeps, sizes, warns in (
        (BlockRule(), (32,), True),
        (BlockRule(), (stand_in.PAGE,), False),
        (TrianglePattern(), (32,), False),
    ):
        paged_blocks.PAGE_SIZES = sizes
        with patch.object(cuda, "_LOGGER") as log:
            cuda.TriangleFlashBuilder(_spec(), NAMES, _engine(keeps), torch.device("cpu"))
        assert log.warning.called is warns


def _check_refusals() -> None:
    """Block-sparse layers that our kernels do not take stop the engine while it starts."""
    for spec, why in ((_spec(torch.float32), None), (_spec(), "no library")):
        cuda.why_not_device = lambda index, why=why: why
        words = f"cannot be a block-sparse layer: .*{why or 'fast kernels are for float16'}"
        with pytest.raises(ServingError, match=words):
            cuda.TriangleFlashBuilder(spec, NAMES, _engine(BlockRule()), torch.device("cpu"))


def main(seed: int) -> None:
    """Random steps; prints in how many rows streamed, or were of sparse tiles."""
    flash_attn.flash_attn_varlen_func = stand_in.attend
    flash_attn.FlashAttentionMetadataBuilder.__init__ = _builder_init
    cuda.merge_attn_states = stand_in.merge
    torch.cuda.current_device = lambda: 0
    sparse_segments.block_sparse_attention = kernel_blocks  # torch.ops.trianglemix, on a CPU
    in_pages = Mock(wraps=stand_in.attend_pages)
    paged_blocks.attend_pages = in_pages
    paged_blocks.HOPPER_HEAD_SIZES = (stand_in.D,)
    _check_refusals()
    cuda.why_not_device = lambda index: None
    cuda.HOPPER_HEAD_SIZES = (stand_in.D,)
    _check_warning()
    config = engine(TrianglePattern(4, 16, 8))
    support = cuda.TriangleFlashBuilder.get_cudagraph_support(config, None)
    assert support == AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    numbers, streamed = random.Random(seed), 0
    for step in range(STEPS):
        pattern = TrianglePattern(*(numbers.randrange(low, high)
                                    for low, high in ((0, 6), (1, 20), (1, 12))))  # fmt: skip
        requests = _requests(numbers, 120)
        if requests[-1].end:
            streamed += _check(requests, pattern, seed + step)
    sparse = 0
    for step in range(BLOCK_STEPS):
        # In pages, and gathered as for other sizes.
        paged_blocks.PAGE_SIZES = (stand_in.PAGE,) if step % 2 else ()
        rule = BlockRule(numbers.choice([0.3, 0.6, 0.9]), numbers.choice([0, 150]), 4,
                         numbers.choice([1, 128]), numbers.choice([1, 8, 128]))  # fmt: skip
        requests = _requests(numbers, 700)
        if requests[-1].end:
            calls = in_pages.call_count
            was_sparse = _check(requests, rule, seed + step)
            assert (in_pages.call_count > calls) == (was_sparse and step % 2 == 1)
            sparse += was_sparse
    print(f"streamed {streamed} sparse {sparse}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
