"""The hand-over of torch tensors to the CUDA library, with a library that runs on the host."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from trianglemix.custom_ops import cuda_library
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.pytorch import cuda_call
from trianglemix.pytorch.cuda_call import Inputs, buffer_slots, run_kernels

from tests.custom_ops.host_kernels import STREAM, host_library
from tests.custom_ops.tolerances import TOLERANCES
from tests.pytorch.reference_call import RandomCall, calls

BUDGET = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NUMBERS = {"sink": 2, "window": 8, "last": 4, "scale": 0.25, "softcap": 0.0}


@pytest.fixture(scope="module", autouse=True)
def _library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The host library in the place of the CUDA library, its stream the current one."""
    path = host_library(tmp_path_factory.mktemp("library"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_library, "cuda_library_path", lambda: path)
        patch.setattr(cuda_call, "current_stream", lambda _: STREAM)
        patch.setattr(cuda_call, "is_capturing", lambda: False)
        patch.setattr(cuda_call, "_thread", cuda_call._Thread())
        cuda_library.load_kernels.cache_clear()
        yield
    cuda_library.load_kernels.cache_clear()


@pytest.fixture(autouse=True)
def thread(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the module keeps, empty at first."""
    monkeypatch.setattr(cuda_call, "_thread", cuda_call._Thread())
    return cuda_call._thread


def rows(x: Tensor) -> Tensor:
    """`[B, H, S, D]` that lies as `[B, S, H, D]`."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def in_buffer(x: Tensor) -> Tensor:
    """The first slots of a larger buffer, the others NaN."""
    B, G, T, D = x.shape
    buffer = torch.full((B, G, T + 5, D), torch.nan, dtype=x.dtype, device=x.device)
    buffer[:, :, :T] = x
    return buffer[:, :, :T]


def behind(x: Tensor) -> Tensor:
    """The last slots of a larger buffer: of the last head no slots are behind them."""
    B, G, T, D = x.shape
    buffer = torch.full((B, G, T + 3, D), torch.nan, dtype=x.dtype, device=x.device)
    buffer[:, :, 3:] = x
    return buffer[:, :, 3:]


def askew(x: Tensor) -> Tensor:
    """At an address that is no multiple of 16 bytes."""
    storage = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    storage[1:] = x.flatten()
    return storage[1:].view(x.shape)


def askew_rows(x: Tensor) -> Tensor:
    """As projections leave queries, at such an address."""
    return askew(x.transpose(1, 2).contiguous()).transpose(1, 2)


def in_packed(x: Tensor) -> Tensor:
    """A part of queries, keys and values that were computed as one."""
    B, H, S, D = x.shape
    packed = torch.full((B, S, 3 * H * D), torch.nan, dtype=x.dtype, device=x.device)
    packed[..., H * D : 2 * H * D] = x.transpose(1, 2).reshape(B, S, H * D)
    return packed[..., H * D : 2 * H * D].view(B, S, H, D).transpose(1, 2)


def wide(x: Tensor) -> Tensor:
    """Every second number of a larger tensor."""
    return x.repeat_interleave(2, 3)[..., ::2]


LAYOUTS = (torch.Tensor.contiguous, rows, in_buffer, behind, askew, askew_rows, in_packed, wide)


def inputs_of(call: RandomCall) -> Inputs:
    end = call.rows.start + call.query.shape[2]
    ends = torch.full((call.query.shape[0],), end - 1, dtype=torch.int32)
    prompt, first = (
        torch.tensor(x, dtype=torch.int32) for x in (call.rows.prompt_length, call.rows.first_valid)
    )
    return Inputs(call.query, call.key, call.value, ends, prompt, first)


def numbers_of(call: RandomCall) -> dict[str, float]:
    pattern = call.attention.pattern
    return {
        "sink": pattern.num_sink_tokens,
        "window": pattern.sliding_window_size,
        "last": pattern.num_last_tokens,
        "scale": call.attention.scale,
        "softcap": call.attention.softcap,
    }


@given(calls(), *[st.sampled_from(LAYOUTS)] * 3)
@BUDGET
def test_any_layout_gives_the_reference(call: RandomCall, query: Any, key: Any, value: Any) -> None:
    inputs = inputs_of(call)
    given = inputs._replace(query=query(call.query), key=key(call.key), value=value(call.value))
    output = run_kernels("triangle", given, numbers_of(call))
    call.check(output)
    assert output.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_and_values_of_one_layout(layout: Any) -> None:
    inputs = small()
    laid = inputs._replace(
        query=layout(inputs.query), key=layout(inputs.key), value=layout(inputs.value)
    )
    expected = run_kernels("triangle", inputs, NUMBERS)
    assert torch.equal(run_kernels("triangle", laid, NUMBERS), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype) -> None:
    inputs = small(dtype=dtype)
    exact = Inputs(*(x.float() for x in inputs[:3]), *inputs[3:])
    output, expected = (run_kernels("triangle", x, NUMBERS) for x in (inputs, exact))
    tolerance = TOLERANCES[str(dtype).removeprefix("torch.")]
    assert output.dtype == dtype
    assert (output.float() - expected).abs().max() <= tolerance * expected.abs().max()


def small(
    tokens: int = 20, keys: int = 30, dtype: torch.dtype = torch.float32, batch: int = 2
) -> Inputs:
    random = torch.Generator().manual_seed(tokens + keys)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=random).to(dtype)

    integers = (torch.full((batch,), n, dtype=torch.int32) for n in (keys - 1, keys, 0))
    q = rows(normal(batch, 4, tokens, 16))
    return Inputs(q, normal(batch, 2, keys, 16), normal(batch, 2, keys, 8), *integers)


@st.composite
def buffers(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A view `[B, G, T, D]` of some tensor, by slices that models make of their caches."""
    B, G, T, D = (draw(st.integers(1, high)) for high in (3, 3, 9, 3))
    base = torch.arange(B * G * T * 8 * D, dtype=torch.float32).view(B, G, T, 8 * D)
    base = draw(st.sampled_from([base, rows(base)]))
    begin = draw(st.integers(0, T - 1))
    end = draw(st.integers(begin + 1, T))
    head, row = draw(st.integers(0, G - 1)), draw(st.integers(0, B - 1))
    view = base[draw(st.sampled_from([slice(None), slice(row, None)]))]
    view = view[:, draw(st.sampled_from([slice(None), slice(head, None)])), begin:end]
    return base, draw(st.sampled_from([view, view[..., :8], view[:, :1].expand(-1, 2, -1, -1)]))


@given(buffers())
@settings(max_examples=300, deadline=None)
def test_the_slots_of_a_buffer_are_where_the_kernels_look(case: tuple[Tensor, Tensor]) -> None:
    base, view = case
    slots = buffer_slots(view)
    B, G, T, D = view.shape
    if slots is None:
        assert not view.is_contiguous()
        return
    begin = view.storage_offset()
    whole = base.flatten() if base.is_contiguous() else base.transpose(1, 2).flatten()
    assert begin + B * G * slots * D <= whole.numel()
    looked_at = torch.as_strided(whole, (B, G, T, D), (G * slots * D, slots * D, D, 1), begin)
    assert torch.equal(looked_at, view)


def test_a_cache_of_fixed_length_is_read_in_place() -> None:
    key = in_buffer(torch.zeros(2, 3, 7, 8))
    assert buffer_slots(key) == 12
    assert buffer_slots(key[:1]) == 12
    assert buffer_slots(key[:, :1]) == 36, "of one head, with the others behind its slots"
    assert buffer_slots(key[:, :2]) is None
    assert buffer_slots(key[:, :, :1]) == 12
    assert buffer_slots(behind(torch.zeros(2, 3, 7, 8))) is None
    assert buffer_slots(askew(torch.zeros(2, 3, 7, 8))) is None


def test_a_problem_is_built_once_whatever_the_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    built, make = [], cuda_call._new_problem
    monkeypatch.setattr(
        cuda_call, "_new_problem", lambda *given: built.append(given[0]) or make(*given)
    )
    for keys in range(30, 40):
        run_kernels("triangle", small(1, keys), NUMBERS)
        run_kernels("triangle", small(20, keys), NUMBERS)
    assert built == ["triangle"]
    run_kernels("triangle", small(20, 30), NUMBERS | {"window": 9})
    run_kernels("block_sparse", small(20, 30), NUMBERS | {"mass": 1.0, "min_length": 0})
    assert built == ["triangle", "triangle", "block_sparse"]


def test_what_is_kept_is_bounded(thread: Any) -> None:
    for window in range(1, 150):
        run_kernels("triangle", small(1, 30), NUMBERS | {"window": window})
    assert len(thread.prepared) <= 64


def test_scratch_is_as_large_as_the_library_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It depends on both lengths, so a change of either asks again."""
    asked = list[tuple[int, int]]()
    inputs = (small(20, 30), small(20, 30), small(20, 31), small(19, 31), small(19, 31))
    run_kernels("triangle", inputs[0], NUMBERS)
    (prepared,) = cuda_call._thread.prepared.values()
    ask = prepared.kernels.workspace_bytes

    def watch(address: int) -> int:
        problem = prepared.problem
        asked.append((problem.query_length, problem.present_capacity))
        return ask(address)

    prepared.kernels = dataclasses.replace(prepared.kernels, workspace_bytes=watch)
    for one in inputs:
        run_kernels("triangle", one, NUMBERS)
    assert asked == [(20, 31), (19, 31)]


def test_scratch_stays_with_its_stream_but_for_captured_graphs(
    thread: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = torch.empty(1)
    first = cuda_call._scratch(100, given, 1)
    assert cuda_call._scratch(80, given, 1) is first
    assert cuda_call._scratch(100, given, 2) is not first
    larger = cuda_call._scratch(200, given, 1)
    assert larger.nbytes == 200
    assert cuda_call._scratch(100, given, 1) is larger
    huge = cuda_call._MOST_KEPT_BYTES + 1
    assert cuda_call._scratch(huge, given, 1).nbytes == huge
    assert cuda_call._scratch(100, given, 1) is larger, "what is huge is not kept"
    monkeypatch.setattr(cuda_call, "is_capturing", lambda: True)
    assert cuda_call._scratch(100, given, 1) is not larger, "the graph's pool has its own"
    monkeypatch.setattr(cuda_call, "is_capturing", lambda: False)
    for stream in range(30):
        cuda_call._scratch(10, given, stream)
    assert len(thread.scratch) <= cuda_call._MOST_KEPT_STREAMS


def test_the_librarys_errors_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_call, "current_stream", lambda _: STREAM + 1)
    with pytest.raises(RuntimeError, match="the CUDA kernels say: not on the current stream"):
        run_kernels("triangle", small(), NUMBERS)


def test_threads_share_nothing() -> None:
    """A problem is filled anew for each call, while another thread's call reads its own."""
    wanted = {keys: run_kernels("triangle", small(20, keys), NUMBERS) for keys in (40, 60)}
    wrong = list[int]()

    def run(keys: int) -> None:
        for _ in range(30):
            if not torch.equal(run_kernels("triangle", small(20, keys), NUMBERS), wanted[keys]):
                wrong.append(keys)

    threads = [threading.Thread(target=run, args=(keys,)) for keys in (40, 60, 40, 60)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong


def test_rules_and_masks_of_block_sparse_layers_arrive() -> None:
    rule = NUMBERS | {"mass": 0.5, "min_length": 600}
    for mask, text in ((None, "mask 0"), (torch.zeros(2, 4, 1, 1, dtype=torch.uint8), "mask 1")):
        with pytest.raises(RuntimeError, match=f"mass 0.5 least 600 pattern 2 8 4 {text}"):
            run_kernels("block_sparse", small(), rule, mask)


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(2, 4, 1, 1),
        torch.zeros(8, dtype=torch.uint8),
        torch.zeros(2, 4, 1, 2, dtype=torch.uint8),
        torch.zeros(4, 2, 1, 1, dtype=torch.uint8),
        torch.zeros(2, 4, 2, 2, dtype=torch.uint8)[..., :1, :1],
        torch.zeros(2, 4, 1, 1, dtype=torch.uint8, device="meta"),
    ],
)
def test_a_mask_that_the_kernels_would_write_past_is_refused(mask: Tensor) -> None:
    rule = NUMBERS | {"mass": 0.5, "min_length": 600}
    with pytest.raises(ConfigurationError, match=r"block_mask is .* must be contiguous uint8"):
        run_kernels("block_sparse", small(), rule, mask)


def test_nothing_to_do_gives_zeros() -> None:
    for inputs in (small(0, 30), small(20, 0), small(20, 30, batch=0)):
        output = run_kernels("triangle", inputs, NUMBERS)
        assert output.shape == (*inputs.query.shape[:3], 8)
        assert not output.any()


LENGTH = torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": torch.zeros(2, 3, 30, 16)}, "must agree in batch, heads and tokens"),
        ({"value": torch.zeros(2, 2, 29, 8)}, "must agree in batch, heads and tokens"),
        (
            {"query": torch.zeros(2, 80, 16)},
            r"query is \[2, 80, 16\], key .* but must be \[B, H, S, D",
        ),
        ({"key": torch.zeros(2, 2, 30)}, r"but must be \[B, H, S, D\]"),
        ({"query": torch.zeros(3, 4, 20, 16)}, r"query is \[3, 4, 20, 16\] and key"),
        ({"query": torch.zeros(2, 4, 20, 24)}, "must agree in batch and head size"),
        ({"query": torch.zeros(2, 3, 20, 16)}, "num_heads 3 must be a positive multiple"),
        ({"value": torch.zeros(2, 2, 30, 12)}, "value size is 12"),
        ({"value": torch.zeros(2, 2, 30, 8).half()}, "value torch.float16, but must be"),
        ({"query": torch.zeros(2, 4, 20, 16).double()}, "query is torch.float64"),
        ({"seqlens_k": LENGTH.long()}, r"seqlens_k is torch.int64 \[2\], but must be"),
        ({"first_valid": LENGTH[:1]}, r"first_valid is torch.int32 \[1\]"),
        ({"prompt_length": LENGTH.repeat(2)[::2]}, "prompt_length is .* contiguous int32"),
        ({"prompt_length": LENGTH.to("meta")}, r"on cpu, but its other .*\['cpu', 'meta'\]"),
    ],
)
def test_what_is_no_call_is_refused(changes: dict[str, Tensor], message: str) -> None:
    run_kernels("triangle", small(), NUMBERS)
    with pytest.raises(ConfigurationError, match=message):
        run_kernels("triangle", small()._replace(**changes), NUMBERS)
