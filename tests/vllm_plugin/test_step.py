"""A whole step through builder and layer, vLLM's classes and kernels replaced by small ones."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.vllm.backend import Step, TriangleBuilding, TriangleForward
from trianglemix.vllm.errors import ServingError
from trianglemix.vllm.gathered_past import gather_past
from trianglemix.vllm.paged import FlashCalls, PagedKeys, stream_paged
from trianglemix.vllm.prompt_lengths import ENDLESS
from trianglemix.vllm.roles import Keeps
from trianglemix.vllm.row_split import Request

from tests.vllm_plugin.flash_stand_in import SCALE, D, attend, merge, random_batch
from tests.vllm_plugin.test_row_split import RULES, steps

LAYERS = 3


@dataclass
class Common:
    """The fields of vLLM's `CommonAttentionMetadata` that a plain step fills."""

    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Tensor
    slot_mapping: Tensor
    causal: bool = True
    seq_lens_cpu_upper_bound: Tensor | None = None
    rswa_prefix_lens: Tensor | None = None


class PlainBuilder:
    """In the place of vLLM's builder: its metadata are the step's own numbers."""

    def __init__(self, spec: Any, names: list[str], vllm_config: Any, device: Any) -> None:
        self.drafted = 0
        self.window = vllm_config.model_config.rswa_window

    def build(self, prefix: int, common: Common, fast_build: bool = False) -> SimpleNamespace:
        assert common.seq_lens.dtype == torch.int32
        return SimpleNamespace(common=common, num_actual_tokens=common.num_actual_tokens)

    def build_for_drafting(self, common: Common, index: int) -> SimpleNamespace:
        return self.build(0, common, True)


class PlainAttention:
    """In the place of vLLM's implementation: dense, over pages."""

    attn_type, sliding_window, alibi_slopes, sinks = "decoder", None, None, None
    kv_cache_dtype = "auto"
    scale, logits_soft_cap = SCALE, 0.0

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, metadata: Any,
        output: Tensor,
    ) -> Tensor:  # fmt: skip
        if metadata is None or metadata.num_actual_tokens == 0:
            return output
        common: Common = metadata.common
        both = cache.transpose(1, 2)
        attend(
            query, both[..., :D], both[..., D:], common.max_query_len, common.query_start_loc,
            common.max_seq_len, common.seq_lens, SCALE, True, None, common.block_table_tensor,
            out=output,
        )  # fmt: skip
        return output


class Builder(TriangleBuilding, PlainBuilder):
    """Ours over the small one."""


class Layer(TriangleForward, PlainAttention):
    """Ours over the small one, with the calls that the CUDA backend makes."""

    def stream(self, query: Tensor, cache: Tensor, step: Step, output: Tensor) -> None:
        assert isinstance(step.keeps, TrianglePattern)
        both = cache.transpose(1, 2)
        keys = PagedKeys(both[..., :D], both[..., D:])
        calls = FlashCalls(attend, merge, {"softmax_scale": SCALE})
        stream_paged(query, keys, step.ours, step.sinks, step.keeps, calls, output)

    def gather(self, cache: Tensor, table: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        return gather_past(cache, table, tokens)


class FullAttentionSpec:
    """The name is what is looked at."""

    sliding_window = None


def section_of(keeps: Keeps, layers: str) -> dict[str, Any]:
    """A section with layers of one role."""
    if isinstance(keeps, BlockRule):
        blocks = {"block_sparse_layers": layers, "block_rule": keeps.as_attributes()}
        return {"layers": "none", **blocks}
    return {"layers": layers, "pattern": list(keeps.as_attributes().values())}


def engine(keeps: Keeps, layers: str = "1", **changes: Any) -> SimpleNamespace:
    """A `VllmConfig` as far as the plug-in looks into it, with `LAYERS` layers of ours."""
    names = [f"model.layers.{n}.self_attn.attn" for n in range(LAYERS)]
    modules = {name: SimpleNamespace(impl=Layer()) for name in names}
    architecture = SimpleNamespace(
        total_num_attention_heads=4, total_num_kv_heads=2, rswa_window=None
    )

    class Model(SimpleNamespace):
        rswa_window = property(lambda self: self.model_arch_config.rswa_window)

    model = Model(
        model_arch_config=architecture,
        get_total_num_hidden_layers=lambda: LAYERS,
        get_head_size=lambda: D,
        get_hidden_size=lambda: 64,
        get_vocab_size=lambda: 99,
        get_layers_start_end_indices=lambda parallel: (0, LAYERS),
    )
    return SimpleNamespace(**{
        "model_config": model,
        "additional_config": {"trianglemix": section_of(keeps, layers)},
        "compilation_config": SimpleNamespace(static_forward_context=modules),
        "parallel_config": SimpleNamespace(rank=1, tensor_parallel_size=2),
        "instance_id": "test",
    } | changes)  # fmt: skip


def builder_of(config: SimpleNamespace) -> Builder:
    names = list(config.compilation_config.static_forward_context)
    return Builder(FullAttentionSpec(), names, config, torch.device("cpu"))


def common_of(requests: list[Request], table: Tensor) -> Common:
    starts = torch.tensor([0, *(r.end for r in requests)], dtype=torch.int32)
    tokens = torch.tensor([r.tokens for r in requests], dtype=torch.int32)
    rows = [r.end - r.begin for r in requests]
    return Common(
        starts, starts, tokens, len(requests), int(starts[-1]), max(rows, default=0),
        max((r.tokens for r in requests), default=0), table, torch.arange(int(starts[-1])),
        seq_lens_cpu_upper_bound=tokens,
        rswa_prefix_lens=torch.tensor([r.prompt_length for r in requests], dtype=torch.int32),
    )  # fmt: skip


def step_of(pattern: TrianglePattern, common: Common) -> Step:
    step: Step = builder_of(engine(pattern)).build(0, common).trianglemix["triangle"]
    return step


def run(config: SimpleNamespace, layer: int, common: Common, batch: Any, extra: int = 0) -> Tensor:
    metadata = builder_of(config).build(0, common)
    name = f"model.layers.{layer}.self_attn.attn"
    module = config.compilation_config.static_forward_context[name]
    output = torch.full((len(batch.query) + extra, *batch.query.shape[1:]), float("nan"))
    key = torch.zeros(len(batch.query), 2, D)
    module.impl.forward(module, batch.query, key, key, batch.cache, metadata, output)
    return output


@settings(max_examples=60, deadline=None)
@given(
    steps(),
    st.builds(TrianglePattern, st.integers(0, 6), st.integers(1, 20), st.integers(1, 12)),
    st.integers(0, 2**31),
)
def test_a_triangle_layer_keeps_what_the_predicate_keeps(
    requests: list[Request], pattern: TrianglePattern, seed: int
) -> None:
    batch = random_batch(requests, pattern, seed)
    common = common_of(requests, batch.table)
    config = engine(pattern)
    found = run(config, 1, common, batch)
    torch.testing.assert_close(found.double(), batch.expected.double(), rtol=0, atol=2e-6)
    dense = run(config, 0, common, batch)
    torch.testing.assert_close(dense.double(), batch.dense.double(), rtol=0, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(steps(longest=600), RULES, st.integers(0, 2**31))
def test_a_block_sparse_layer_keeps_what_the_rule_keeps(
    requests: list[Request], rule: BlockRule, seed: int
) -> None:
    """A tile cut by the step's beginning is dense; one cut by its end goes by what is here."""
    batch = random_batch(requests, rule, seed)
    found = run(engine(rule), 1, common_of(requests, batch.table), batch)
    torch.testing.assert_close(found.double(), batch.expected.double(), rtol=0, atol=2e-6)


def test_layers_of_two_roles_split_a_step_in_two_ways() -> None:
    pattern, rule = TrianglePattern(4, 16, 8), BlockRule(0.4, 0, 4, 1, 8)
    section = section_of(rule, "2") | section_of(pattern, "1")
    config = engine(pattern, additional_config={"trianglemix": section})
    requests = [Request(0, 300, 400, 520), Request(300, 301, 90, 80), Request(301, 701, 400, 400)]
    for layer, keeps in ((1, pattern), (2, rule)):
        batch = random_batch(requests, keeps, layer)
        assert not torch.equal(batch.expected, batch.dense)
        found = run(config, layer, common_of(requests, batch.table), batch)
        torch.testing.assert_close(found.double(), batch.expected.double(), rtol=0, atol=2e-6)
    steps = builder_of(config).build(0, common_of(requests, batch.table)).trianglemix
    assert {role: (step.our_rows, step.dense_rows) for role, step in steps.items()} == {
        "triangle": (300 + 372, 1 + 28), "block_sparse": (272 + 384, 28 + 1 + 16),
    }  # fmt: skip


def test_mass_1_is_vllm_s_own_attention() -> None:
    requests = [Request(0, 600, 600, 600)]
    batch = random_batch(requests, BlockRule(1.0, 0), 0)
    metadata = builder_of(engine(BlockRule(1.0, 0))).build(0, common_of(requests, batch.table))
    assert not metadata.trianglemix
    metadata = builder_of(engine(BlockRule(0.9, 0))).build(0, common_of(requests, batch.table))
    assert metadata.trianglemix["block_sparse"].our_rows == 384


def test_where_nothing_streams_the_metadata_are_vllm_s() -> None:
    pattern = TrianglePattern(4, 16, 8)
    requests = [Request(0, 28, 28, 28), Request(28, 29, 60, 50)]
    batch = random_batch(requests, pattern, 0)
    metadata = builder_of(engine(pattern)).build(0, common_of(requests, batch.table))
    assert not metadata.trianglemix
    longer = [Request(0, 29, 29, 29), Request(29, 30, 60, 50)]
    batch = random_batch(longer, pattern, 0)
    step = step_of(pattern, common_of(longer, batch.table))
    assert (step.our_rows, step.dense_rows) == (1, 29)


def test_a_builder_made_again_does_not_see_our_window() -> None:
    """vLLM makes builders anew after it tried how much memory graphs take."""
    config = engine(TrianglePattern(4, 16, 8))
    for _ in range(2):
        assert builder_of(config).window is None
        assert config.model_config.rswa_window == ENDLESS


def test_an_engine_without_the_section_is_left_alone() -> None:
    config = engine(TrianglePattern(4, 16, 8), additional_config={})
    requests = [Request(0, 60, 60, 60)]
    batch = random_batch(requests, TrianglePattern(4, 16, 8), 1)
    common = common_of(requests, batch.table)
    common.rswa_prefix_lens = None
    metadata = builder_of(config).build(0, common)
    assert not hasattr(metadata, "trianglemix")
    assert config.model_config.rswa_window is None
    found = run(config, 1, common, batch)
    torch.testing.assert_close(found.double(), batch.dense.double(), rtol=0, atol=2e-6)


def test_rows_are_counted_by_layer() -> None:
    pattern = TrianglePattern(4, 16, 8)
    section = section_of(BlockRule(), "1") | section_of(pattern, "0,2")
    config = engine(pattern, additional_config={"trianglemix": section})
    requests = [Request(0, 40, 40, 50), Request(40, 41, 30, 20)]
    batch = random_batch(requests, pattern, 2)
    builder = builder_of(config)
    metadata = builder.build(0, common_of(requests, batch.table))
    key = torch.zeros(41, 2, D)
    for module in config.compilation_config.static_forward_context.values():
        output = torch.empty_like(batch.query)
        module.impl.forward(module, batch.query, key, key, batch.cache, metadata, output)
    streamed = {"triangle": 20, "dense": 21}
    assert {layer.index: layer.count.rows for layer in builder._layers} == {
        0: streamed, 1: {"block_sparse": 0, "dense": 41}, 2: streamed,
    }  # fmt: skip


def test_guessing_layers_get_vllm_s_metadata_and_need_no_lengths() -> None:
    pattern = TrianglePattern(4, 16, 8)
    requests = [Request(0, 60, 60, 60)]
    common = common_of(requests, random_batch(requests, pattern, 0).table)
    common.rswa_prefix_lens = None
    builder = builder_of(engine(pattern))
    assert not hasattr(builder.build_for_drafting(common, 0), "trianglemix")
    with pytest.raises(ServingError, match="did not hand over"):
        builder.build(0, common)


def test_without_sinks_there_is_one_call() -> None:
    pattern, requests = TrianglePattern(0, 16, 8), [Request(0, 60, 60, 60)]
    batch = random_batch(requests, pattern, 3)
    step = step_of(pattern, common_of(requests, batch.table))
    both, calls = batch.cache.transpose(1, 2), []

    def counted(**given: Any) -> Any:
        calls.append(given["window_size"])
        return attend(**given)

    rows = step.ours.rows
    output = torch.empty_like(rows.take(batch.query))
    stream_paged(
        rows.take(batch.query), PagedKeys(both[..., :D], both[..., D:]), step.ours,
        step.sinks, pattern, FlashCalls(counted, merge, {"softmax_scale": SCALE}), output,
    )  # fmt: skip
    assert calls == [[15, 0]]
    right = rows.take(batch.expected).double()
    torch.testing.assert_close(output.double(), right, rtol=0, atol=2e-6)


def test_guesses_that_were_wrong_are_known_to_the_device_alone() -> None:
    """The CPU's count of tokens is an upper bound in rows that check guesses."""
    pattern = TrianglePattern(4, 16, 8)
    requests = [Request(0, 3, 70, 50), Request(3, 63, 60, 60)]
    batch = random_batch(requests, pattern, 4)
    common = common_of(requests, batch.table)
    common.seq_lens_cpu_upper_bound = common.seq_lens + torch.tensor([2, 0], dtype=torch.int32)
    common.max_seq_len += 2
    found = run(engine(pattern), 1, common, batch)
    torch.testing.assert_close(found.double(), batch.expected.double(), rtol=0, atol=2e-6)


def test_an_output_that_is_to_be_quantised_is_refused() -> None:
    pattern, requests = TrianglePattern(4, 16, 8), [Request(0, 60, 60, 60)]
    batch, config = random_batch(requests, pattern, 5), engine(pattern)
    metadata = builder_of(config).build(0, common_of(requests, batch.table))
    module = config.compilation_config.static_forward_context["model.layers.1.self_attn.attn"]
    key, output = torch.zeros(60, 2, D), torch.empty_like(batch.query)
    given = (module, batch.query, key, key, batch.cache, metadata)
    with pytest.raises(ServingError, match="quantised in one go"):
        module.impl.forward(*given, output=output, output_scale=torch.ones(1))
    module.impl.forward(*given, output=output, output_scale=None, output_block_scale=None)
