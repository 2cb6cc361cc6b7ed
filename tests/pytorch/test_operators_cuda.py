"""`torch.ops.trianglemix` on a GPU: the reference's answers, graphs, streams, patch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN, TrianglePattern
from trianglemix.pytorch import TriangleMixConfig, backends, patch
from trianglemix.pytorch.blocks import Attention, block_attention
from trianglemix.pytorch.cuda_backend import (
    device_lengths,
    kernel_triangle,
    why_not_device,
    why_not_kernels,
)
from trianglemix.pytorch.cuda_call import Inputs, run_kernels
from trianglemix.pytorch.flex import flex_triangle
from trianglemix.pytorch.layout import Rows
from trianglemix.pytorch.operators import attend_blocks, attend_triangle

from tests.custom_ops.tolerances import TOLERANCES
from tests.pytorch.reference_call import RandomCall, calls
from tests.pytorch.test_block_sparse import SparseCall
from tests.pytorch.test_block_sparse import calls as sparse_calls
from tests.pytorch.test_cuda_call import LAYOUTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
BUDGET = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
NUMBERS = (8, 128, 64, 0.125, 0.0)
PATTERN = TrianglePattern(8, 128, 64)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensors(
    S: int,
    T: int,
    *,
    batch: int = 2,
    size: int = 64,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """As a model has them: queries lie as `[B, S, H, D]`, keys as `[B, G, T, D]`."""
    random = torch.Generator("cuda").manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, device="cuda", generator=random).to(dtype)

    q = normal(batch, S, 8, size).transpose(1, 2)
    return q, normal(batch, 2, T, size), normal(batch, 2, T, size)


def lengths(*numbers: list[int]) -> list[Tensor]:
    return [torch.tensor(x, dtype=torch.int32, device="cuda") for x in numbers]


def close(output: Tensor, expected: Tensor) -> None:
    """Within the dtype's tolerance of the largest value."""
    off = (output.double() - expected.double()).abs().max()
    assert off <= TOLERANCES[name_of(output.dtype)] * expected.double().abs().max(), off


def exact(q: Tensor, k: Tensor, v: Tensor, rows: Rows, attention: Attention) -> Tensor:
    return block_attention(q.double(), k.double(), v.double(), rows, attention)


def test_the_library_is_here() -> None:
    assert why_not_device(0) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_random_calls_equal_the_definition(dtype: torch.dtype) -> None:
    @given(calls(), *[st.sampled_from(LAYOUTS)] * 3)
    @BUDGET
    def check(call: RandomCall, query: Any, key: Any, value: Any) -> None:
        plain = [x.to("cuda", dtype) for x in (call.query, call.key, call.value)]
        laid = [make(x) for make, x in zip((query, key, value), plain, strict=True)]
        output = kernel_triangle(laid[0], laid[1], laid[2], call.rows, call.attention)
        close(output, exact(plain[0], plain[1], plain[2], call.rows, call.attention))

    check()


@pytest.mark.parametrize("size", [64, 96, 128, 256, 80])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("S", "T"), [(1, 3000), (5, 3000), (700, 3000), (3000, 3000)])
def test_prompts_chunks_and_steps(size: int, dtype: torch.dtype, S: int, T: int) -> None:
    q, k, v = tensors(S, T, size=size, dtype=dtype)
    rows = Rows(T - S, (0, 333), (T + 100, T))
    for pattern in (PATTERN, DENSE_PATTERN):
        attention = Attention(pattern, size**-0.5)
        close(kernel_triangle(q, k, v, rows, attention), exact(q, k, v, rows, attention))


def test_rows_that_end_elsewhere() -> None:
    """Continuous batches: each row has its own end, and nothing behind it is read."""
    q, k, v = tensors(300, 1000, batch=3)
    ends, prompts, first = [1000, 420, 120], [1000, 900, 120], [0, 17, 0]
    for b, end in enumerate(ends):
        k[b, :, end:] = v[b, :, end:] = torch.nan
    output = attend_triangle(q, k, v, *lengths([e - 1 for e in ends], prompts, first), *NUMBERS)
    for b, end in enumerate(ends):
        start, tokens = max(0, end - 300), min(300, end)
        one = slice(b, b + 1)
        expected = exact(
            q[one, :, :tokens], k[one, :, :end], v[one, :, :end],
            Rows(start, (first[b],), (prompts[b],)), Attention(PATTERN, 0.125),
        )  # fmt: skip
        close(output[one, :, :tokens], expected)
        assert not output[one, :, tokens:].any()


def test_the_first_slots_of_a_cache_are_read_in_place_and_never_written() -> None:
    buffers = [torch.full((2, 2, 4096, 64), torch.nan, device="cuda").half() for _ in range(2)]
    q, k, v = tensors(500, 1500)
    for buffer, x in zip(buffers, (k, v), strict=True):
        buffer[:, :, :1500] = x
    before = [x.nan_to_num(7.0) for x in buffers]
    views = [x[:, :, :1500] for x in buffers]
    rows, attention = Rows(1000, (0, 40), (1500, 1500)), Attention(PATTERN, 0.125)
    kernel_triangle(q, views[0], views[1], rows, attention)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = kernel_triangle(q, views[0], views[1], rows, attention)
    copied = views[0].numel() * 2
    assert torch.cuda.max_memory_allocated() - held < output.numel() * 2 + 2**25 + copied
    close(output, exact(q, k, v, rows, attention))
    assert all(torch.equal(x.nan_to_num(7.0), y) for x, y in zip(buffers, before, strict=True))


def test_a_call_waits_for_nothing() -> None:
    q, k, v = tensors(500, 1500)
    rows, attention = Rows(1000, (0, 40), (1500, 1500)), Attention(PATTERN, 0.125)
    kernel_triangle(q, k, v, rows, attention)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for start in range(1000, 1003):
            kernel_triangle(q, k, v, replace(rows, start=start - 10), attention)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream() -> None:
    """Scratch and lengths are each stream's own, or two streams would disturb each other."""
    q, k, v = tensors(2000, 6000)
    rows, attention = Rows(4000, (0, 100), (6000, 6000)), Attention(PATTERN, 0.125)
    expected = kernel_triangle(q, k, v, rows, attention)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    outputs = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                outputs.append(kernel_triangle(q, k, v, rows, attention))
    torch.cuda.synchronize()
    assert all(torch.equal(output, expected) for output in outputs)


@pytest.mark.parametrize("operator", [attend_triangle, attend_blocks])
def test_a_captured_graph_follows_tensors_and_lengths(operator: Any) -> None:
    more = (0.7, 0) if operator is attend_blocks else ()
    q, k, v = tensors(1200, 3000)
    of_rows = lengths([2999, 2999], [3000, 3000], [0, 40])
    operator(q, k, v, *of_rows, *NUMBERS, *more)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = operator(q, k, v, *of_rows, *NUMBERS, *more)
    other = tensors(1200, 3000, seed=5)
    for ends, prompts, first in (
        ([2999, 2999], [3000] * 2, [0, 40]),
        ([1500, 2999], [1501, 4000], [9, 0]),
    ):
        for x, y in zip((q, k, v), other, strict=True):
            x.copy_(y)
        for x, numbers in zip(of_rows, (ends, prompts, first), strict=True):
            x.copy_(torch.tensor(numbers))
        graph.replay()
        beside = operator(q, k, v, *of_rows, *NUMBERS, *more)
        torch.cuda.synchronize()
        assert torch.equal(output, beside)


def test_layers_of_a_patched_model_are_captured() -> None:
    q, k, v = tensors(1200, 3000)
    rows, attention = Rows(1800, (0, 40), (3000, 3000)), Attention(PATTERN, 0.125)
    expected = kernel_triangle(q, k, v, rows, attention)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [kernel_triangle(q, k, v, rows, attention) for _ in range(3)]
    for start in range(20):  # what was shared before is gone when the graph runs
        device_lengths(Rows(start, (0, 1), (9, 9)), 5, q.device)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(output, expected) for output in outputs)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_it_is_one_graph(mode: str) -> None:
    q, k, v = tensors(600, 600)
    of_rows = lengths([599, 599], [600, 600], [0, 40])

    def layer(query: Tensor, key: Tensor, value: Tensor, *lengths: Tensor) -> Tensor:
        output = torch.ops.trianglemix.attend_triangle(query * 2, key, value, *lengths, *NUMBERS)
        return output.transpose(1, 2).flatten(2) + 1

    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    expected = layer(q, k, v, *of_rows)
    for _ in range(4):
        torch.testing.assert_close(compiled(q, k, v, *of_rows), expected)


def test_the_choice_compiles_into_the_graph() -> None:
    q, k, v = tensors(600, 600)
    rows, attention = Rows(0, (0, 40), (600, 600)), Attention(PATTERN, 0.125)

    def layer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return backends.triangle_attention(query * 2, key, value, rows, attention)

    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True)
        torch.testing.assert_close(compiled(q, k, v), layer(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_block_sparse_layers_equal_the_rule(dtype: torch.dtype) -> None:
    @given(sparse_calls((name_of(dtype),)))
    @settings(BUDGET, max_examples=20)
    def check(call: SparseCall) -> None:
        q, k, v = (x.cuda() for x in (call.query, call.key, call.value))
        of_rows = device_lengths(call.rows, q.shape[2], q.device)
        rule = call.attention.rule
        size = -(-k.shape[2] // 128)
        mask = torch.zeros(*q.shape[:2], size, size, dtype=torch.uint8, device="cuda")
        numbers = {
            "sink": rule.num_sink_tokens, "window": rule.sliding_window_size,
            "last": rule.num_last_tokens, "scale": call.attention.scale,
            "softcap": call.attention.softcap, "mass": rule.mass, "min_length": rule.min_length,
        }  # fmt: skip
        output = run_kernels("block_sparse", Inputs(q, k, v, *of_rows), numbers, mask)
        call.check(mask.bool().cpu().numpy(), output.cpu())
        assert torch.equal(attend_blocks(q, k, v, *of_rows, *numbers.values()), output)

    check()


def test_patch_takes_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt, chunks, padded batch, decode: the tokens and logits of flex_attention."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        "llama", hidden_size=256, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=128, pad_token_id=0,
        max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).to("cuda", torch.float16).eval()
    rule = BlockRule(1.0)  # keeps all: a tie would make another choice
    patch(
        model,
        TriangleMixConfig(8, 128, 64, triangle_layer_indices=[1], block_sparse_layer_indices=[2],
                          block_rule=rule),
    )  # fmt: skip
    ids = torch.randint(1, 128, (2, 900), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :123] = 0
    taken = list[int]()
    monkeypatch.setattr(
        backends, "kernel_triangle",
        lambda *given: taken.append(given[0].shape[2]) or kernel_triangle(*given),
    )  # fmt: skip

    def run(**given: Any) -> Any:
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=6, do_sample=False, output_logits=True,
            return_dict_in_generate=True, **given,
        )  # fmt: skip

    ours = [run(), run(prefill_chunk_size=300)]
    assert 900 in taken
    assert 300 in taken
    assert taken.count(1) >= 10
    monkeypatch.setattr(backends, "why_not_kernels", lambda *_: "not wanted here")
    for mine, theirs in zip(ours, [run(), run(prefill_chunk_size=300)], strict=True):
        first, second = (torch.stack(x.logits)[0].float() for x in (mine, theirs))
        torch.testing.assert_close(first, second, atol=2e-2, rtol=2e-2)


def test_gradients_and_float32_stay_with_flex_attention() -> None:
    q, k, v = tensors(600, 600)
    rows, attention = Rows(0, (0, 40), (600, 600)), Attention(PATTERN, 0.125)
    assert why_not_kernels(q, k, v) is None
    q.requires_grad_()
    output = backends.triangle_attention(q, k, v, rows, attention)
    output.float().sum().backward()
    assert q.grad is not None
    assert bool(q.grad.isfinite().all())
    wide = [x.detach().float() for x in (q, k, v)]
    flexed = flex_triangle(wide[0], wide[1], wide[2], rows, attention)
    chosen = backends.triangle_attention(wide[0], wide[1], wide[2], rows, attention)
    assert torch.equal(chosen, flexed)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_another_gpu() -> None:
    """The second GPU's tensors while the first is current, as with a device map."""
    q, k, v = tensors(600, 2000)
    rows, attention = Rows(1400, (0, 40), (2000, 2000)), Attention(PATTERN, 0.125)
    expected = kernel_triangle(q, k, v, rows, attention)
    other = [x.to("cuda:1") for x in (q, k, v)]
    output = kernel_triangle(other[0], other[1], other[2], rows, attention)
    assert torch.cuda.current_device() == 0
    assert torch.equal(output.cpu(), expected.cpu())


def test_shapes_of_grouped_heads() -> None:
    """7 and 8 query heads to a key head, one key head, as many as query heads."""
    for shape in (AttentionShape(28, 4, 128, 128), AttentionShape(8, 1, 64, 64),
                  AttentionShape(6, 6, 64, 64), AttentionShape(9, 3, 64, 64)):  # fmt: skip
        q = torch.randn(1, 700, shape.num_heads, shape.head_size, device="cuda").half()
        k = torch.randn(1, shape.kv_num_heads, 700, shape.head_size, device="cuda").half()
        given = (q.transpose(1, 2), k, k, Rows(0, (0,), (700,)), Attention(PATTERN, 0.1))
        close(kernel_triangle(*given), exact(*given))
