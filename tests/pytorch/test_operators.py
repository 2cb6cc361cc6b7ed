"""`torch.ops.trianglemix` where there is no GPU: meaning, fake tensors, gradients, compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import trianglemix.exporter.sources.huggingface.operator_in_torch
from hypothesis import given, settings
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN, TrianglePattern
from trianglemix.pytorch import TriangleMixConfig, backends, block_sparse, cuda_backend, patch
from trianglemix.pytorch.backends import triangle_attention
from trianglemix.pytorch.block_choice import BlockSparse, choose_blocks, choosing_blocks
from trianglemix.pytorch.block_sparse import block_sparse_attention
from trianglemix.pytorch.blocks import Attention, block_attention
from trianglemix.pytorch.cuda_backend import (
    device_lengths,
    kernel_blocks,
    kernel_triangle,
    why_not_kernels,
)
from trianglemix.pytorch.layout import Rows
from trianglemix.pytorch.operators import NoGradientError, attend_blocks, attend_triangle

from tests.pytorch.reference_call import RandomCall, calls
from tests.pytorch.test_block_sparse import SparseCall
from tests.pytorch.test_block_sparse import calls as sparse_calls

PATTERN = (2, 8, 4, 0.25, 0.0)


def lengths(*numbers: list[int]) -> list[Tensor]:
    return [torch.tensor(x, dtype=torch.int32) for x in numbers]


def ragged() -> tuple[Tensor, ...]:
    """Two rows of other lengths: tensors and lengths of a call."""
    random = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, n, t, d, generator=random)
        for n, t, d in ((4, 40, 16), (2, 50, 16), (2, 50, 8))
    )
    return q, k, v, *lengths([49, 30], [50, 45], [0, 3])


@given(calls())
@settings(max_examples=20, deadline=None)
def test_the_operator_equals_the_reference(call: RandomCall) -> None:
    output = kernel_triangle(call.query, call.key, call.value, call.rows, call.attention)
    call.check(output)


@given(sparse_calls())
@settings(max_examples=10, deadline=None)
def test_the_block_sparse_operator_equals_the_reference(call: SparseCall) -> None:
    blocks = choose_blocks(call.query, call.key, call.rows, call.attention).numpy()
    output = kernel_blocks(call.query, call.key, call.value, call.rows, call.attention)
    call.check(blocks, output)


def test_a_short_prompt_of_a_block_sparse_layer_is_dense() -> None:
    q = torch.randn(1, 2, 900, 8, generator=torch.Generator().manual_seed(4))
    rows, dense = Rows(0, (0,), (900,)), Attention(DENSE_PATTERN, 0.3)
    expected = block_attention(q, q, q, rows, dense)
    for least, same in ((900, True), (899, False)):
        output = kernel_blocks(q, q, q, rows, BlockSparse(BlockRule(0.3, least), 0.3))
        assert torch.allclose(output, expected, atol=1e-5) == same


def test_each_row_of_a_ragged_batch_is_its_own() -> None:
    q, k, v, *of_rows = ragged()
    output = attend_triangle(q, k, v, *of_rows, *PATTERN)
    attention = Attention(TrianglePattern(2, 8, 4), 0.25)
    first = block_attention(q[:1], k[:1], v[:1], Rows(10, (0,), (50,)), attention)
    second = block_attention(
        q[1:, :, :31], k[1:, :, :31], v[1:, :, :31], Rows(0, (3,), (45,)), attention
    )
    torch.testing.assert_close(output[:1], first)
    torch.testing.assert_close(output[1:, :, :31], second)
    assert not output[1:, :, 31:].any()
    assert not output[1:, :, :3].any()


def test_impossible_lengths_give_zeros() -> None:
    q, k, v, *_ = ragged()
    output = attend_triangle(q, k, v, *lengths([50, -2], [50, 50], [0, 0]), *PATTERN)
    assert not output.any()


@pytest.mark.parametrize("operator", [attend_triangle, attend_blocks])
def test_torch_finds_nothing_wrong(operator: Any) -> None:
    more = (0.5, 0) if operator is attend_blocks else ()
    torch.library.opcheck(operator, (*ragged(), *PATTERN, *more))


@pytest.mark.parametrize("operator", [attend_triangle, attend_blocks])
def test_fake_tensors_on_cuda_have_the_outputs_layout(operator: Any) -> None:
    more = (0.5, 0) if operator is attend_blocks else ()
    real = operator(*ragged(), *PATTERN, *more)
    with FakeTensorMode():
        tensors = [torch.empty_like(x, device="cuda") for x in ragged()]
        fake = operator(*tensors, *PATTERN, *more)
    assert fake.device.type == "cuda"
    assert fake.transpose(1, 2).is_contiguous(), "as the kernels write it"
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_compiled_it_is_one_graph() -> None:
    def layer(*tensors: Tensor) -> Tensor:
        output: Tensor = torch.ops.trianglemix.attend_triangle(*tensors, *PATTERN)
        return output.transpose(1, 2).flatten(2) * 2

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(*ragged()), layer(*ragged()))


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("operator", [attend_triangle, attend_blocks])
def test_a_gradient_is_refused(operator: Any, which: int) -> None:
    more = (0.5, 0) if operator is attend_blocks else ()
    tensors = ragged()
    tensors[which].requires_grad_()
    with pytest.raises(NoGradientError, match=r"torch.ops.trianglemix.attend_\w+ has no gradient"):
        operator(*tensors, *PATTERN, *more)
    with torch.no_grad():
        operator(*tensors, *PATTERN, *more)
    with torch.inference_mode():
        operator(*tensors, *PATTERN, *more)


def test_a_compiled_gradient_is_refused() -> None:
    def layer(query: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
        result: Tensor = attend_triangle(query @ weight, *others, *PATTERN)
        return result

    q, *others = ragged()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="has no gradient"):
        compiled(q, torch.eye(16, requires_grad=True), *others)


def test_what_is_no_call_is_refused() -> None:
    q, k, v, *of_rows = ragged()
    with pytest.raises(ConfigurationError, match=r"seqlens_k is torch.int64"):
        attend_triangle(q, k, v, of_rows[0].long(), *of_rows[1:], *PATTERN)


def test_the_exporters_operator_is_another() -> None:
    """It appends, and stands for a node of the exported graph."""
    names = trianglemix.exporter.sources.huggingface.operator_in_torch.triangle_attention
    assert names is not None
    assert hasattr(torch.ops.trianglemix, "triangle_attention")
    assert hasattr(torch.ops.trianglemix, "attend_triangle")


@pytest.fixture
def by_operator(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Layers of a patched model on a CPU go the way that they go on CUDA; what was called."""
    called = list[str]()

    def watched(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*given: Any) -> Tensor:
            called.append(run.__name__)
            return run(*given)

        return call

    monkeypatch.setitem(backends.BACKENDS, "cpu", watched(kernel_triangle))
    return called


def tiny() -> Any:
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


CONFIG = TriangleMixConfig(2, 8, 4, triangle_layer_indices=[1])


@pytest.mark.parametrize("chunk", [None, 13])
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_a_patched_model_generates_the_same(
    chunk: int | None, static: bool, by_operator: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left-padded batches, chunks, decode steps, caches that grow and of fixed length."""
    model = patch(tiny(), CONFIG)
    ids = torch.randint(1, 64, (3, 40), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    given: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    given |= {"output_logits": True, "return_dict_in_generate": True}
    given |= {"prefill_chunk_size": chunk} if chunk else {}
    given |= {"cache_implementation": "static", "disable_compile": True} if static else {}
    ours = model.generate(ids, **given)
    assert by_operator.count("kernel_triangle") >= 2 * 5
    monkeypatch.setitem(backends.BACKENDS, "cpu", block_attention)
    blocks = model.generate(ids, **given)
    assert torch.equal(ours.sequences, blocks.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(blocks.logits))


@torch.no_grad()
def test_a_layer_of_a_patched_model_compiles_whole(by_operator: list[str]) -> None:
    rows, attention = Rows(0, (0, 3), (40, 40)), Attention(TrianglePattern(2, 8, 4), 0.25)
    q, k, v = (x[:, :, :40] for x in ragged()[:3])

    def layer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return kernel_triangle(query * 2, key, value, rows, attention)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), layer(q, k, v))


def test_lengths_are_those_of_the_rows() -> None:
    endless = 2**40
    rows = Rows(7, (0, 3, 9), (endless, -(2**40), 30))
    made = device_lengths(rows, 5, torch.device("cpu"))
    assert [x.tolist() for x in made] == [[11] * 3, [2**31 - 1, -(2**31) + 1, 30], [0, 3, 9]]
    assert all(x.dtype == torch.int32 for x in made)


CUDA_CASES: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    ({"dtype": torch.float16, "D": 72, "Dv": 40}, None),
    ({"S": 1, "B": 7}, None),
    ({"device": "cpu"}, "the tensors are on cpu"),
    ({"dtype": torch.float32}, "the dtype is torch.float32"),
    ({"dtype": torch.float64}, "the dtype is torch.float64"),
    ({"key_dtype": torch.float32}, "keys torch.float32 and values"),
    ({"D": 100}, "a head has 100 numbers"),
    ({"Dv": 264}, "a head has 264 numbers"),
    ({"requires_grad": True}, "a gradient is wanted"),
    ({"B": 65536, "S": 1, "T": 1, "D": 8, "Dv": 8}, "65536 rows of 1 keys"),
    ({"T": 2**29, "D": 8, "Dv": 8}, "rows of 536870912 keys"),
    ({"T": 2**28}, "less than 4 GiB"),
]


@pytest.mark.parametrize(("changes", "message"), CUDA_CASES)
def test_what_the_kernels_do_not_take_says_why(
    changes: dict[str, Any], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_backend, "why_not_device", lambda _: None)
    sizes = {"B": 2, "S": 300, "T": 400, "D": 64, "Dv": 64} | changes
    like: dict[str, Any] = {
        "device": changes.get("device", "cuda"), "dtype": changes.get("dtype", torch.bfloat16),
    }  # fmt: skip
    with FakeTensorMode():
        B, T = sizes["B"], sizes["T"]
        q = torch.empty(B, 4, sizes["S"], sizes["D"], **like)
        k = torch.empty(B, 2, T, sizes["D"], **like | {"dtype": changes.get("key_dtype", q.dtype)})
        v = torch.empty(B, 2, T, sizes["Dv"], **like)
        k.requires_grad_(changes.get("requires_grad", False))
        why = why_not_kernels(q, k, v)
        assert why is None if message is None else message in (why or "")
        with torch.no_grad():
            if changes.get("requires_grad"):
                assert why_not_kernels(q, k, v) is None


def test_gpus_and_libraries_that_are_not_there_say_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    ask = cuda_backend._why_not_device.__wrapped__
    capability = [(7, 5)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability[0])
    assert ask(0) == "the GPU has compute capability 7.5, but the kernels need 8.0"
    capability[0] = (9, 0)
    monkeypatch.setattr(
        cuda_backend,
        "load_kernels",
        lambda *_: (_ for _ in ()).throw(cuda_backend.LibraryNotFoundError("not here")),
    )
    assert ask(0) == "not here"
    assert caplog.messages[-1] == "CUDA device 0 runs compiled flex_attention: not here"
    monkeypatch.setattr(cuda_backend, "load_kernels", lambda *_: None)
    assert ask(0) is None
    assert len(caplog.messages) == 2


def test_a_compiled_layer_knows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a library is nothing that a graph can hold."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))

    def layer(x: Tensor) -> Tensor:
        return x if cuda_backend.why_not_device(0) is None else x * 2

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))


@pytest.mark.parametrize(("why", "operator"), [(None, True), ("for some reason", False)])
def test_layers_on_cuda_take_the_kernels_where_nothing_speaks_against_it(
    why: str | None, operator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = list[str]()
    for module, name in ((backends, "kernel_triangle"), (backends, "flex_triangle")):
        monkeypatch.setattr(module, name, lambda q, *_, n=name: taken.append(n) or q)
    monkeypatch.setattr(backends, "why_not_kernels", lambda *_: why)
    with FakeTensorMode():
        q, k = (torch.empty(1, 2, 900, 64, device="cuda", dtype=torch.float16) for _ in range(2))
        triangle_attention(q, k, k, Rows(0, (0,), (900,)), Attention(TrianglePattern(), 0.1))
    assert taken == ["kernel_triangle" if operator else "flex_triangle"]


@pytest.mark.parametrize(
    ("sizes", "hopper", "why", "operator"),
    [
        ((4096, 64, 64), True, None, True),
        ((4095, 64, 64), True, None, False),
        ((4096, 80, 80), True, None, False),
        ((4096, 128, 64), True, None, False),
        ((4096, 64, 64), False, None, False),
        ((4096, 64, 64), True, "some reason", False),
    ],
)
def test_dense_prompts_take_the_kernels_where_they_were_measured(
    sizes: tuple[int, int, int],
    hopper: bool,
    why: str | None,
    operator: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = list[str]()
    for name in ("kernel_triangle", "scaled_dot_product_attention"):
        monkeypatch.setattr(backends, name, lambda q, *_, n=name, **__: taken.append(n) or q)
    for module in (backends, cuda_backend):
        monkeypatch.setattr(module, "why_not_kernels", lambda *_: why)
    monkeypatch.setattr(cuda_backend, "is_hopper", lambda _: hopper)
    S, D, Dv = sizes
    with FakeTensorMode():
        q, v = (torch.empty(1, 32, S, n, device="cuda", dtype=torch.float16) for n in (D, Dv))
        triangle_attention(q, q, v, Rows(0, (0,), (S,)), Attention(DENSE_PATTERN, 0.1))
    assert taken == ["kernel_triangle" if operator else "scaled_dot_product_attention"]


def test_block_sparse_layers_on_cuda_take_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = list[str]()
    monkeypatch.setattr(block_sparse, "kernel_blocks", lambda q, *_: taken.append("kernels") or q)
    monkeypatch.setattr(block_sparse, "why_not_kernels", lambda *_: None)
    q = torch.randn(1, 2, 900, 8)
    arguments = q, q, q, Rows(0, (0,), (900,)), BlockSparse(BlockRule(0.5, 0), 0.3)
    assert block_sparse_attention(*arguments) is q
    with choosing_blocks(lambda _, query, key, rows, a: choose_blocks(query, key, rows, a)):
        assert block_sparse_attention(*arguments) is not q
    assert taken == ["kernels"]
