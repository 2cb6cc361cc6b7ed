"""One call of the CUDA library on torch tensors: what it takes, and the hand-over.

A call costs the host a few microseconds before its two launches: the C structure is built once for
all calls that differ in lengths and addresses only, and scratch, which comes from torch's
allocator, stays with its stream. What is written out below, and looks long, is so for its speed.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from trianglemix.custom_ops.block_sparse.contract import TILE
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.cuda_library import (
    BFLOAT16,
    BLOCK_SPARSE,
    FLOAT16,
    FLOAT32,
    TRIANGLE,
    CudaKernels,
    Problem,
    load_kernels,
)
from trianglemix.custom_ops.errors import ConfigurationError

DTYPES: Final = {
    torch.float32: FLOAT32,
    torch.float16: FLOAT16,
    torch.bfloat16: BFLOAT16,
}
_ENTRIES: Final = {"triangle": TRIANGLE, "block_sparse": BLOCK_SPARSE}
NUMBERS: Final = ("sink", "window", "last", "scale", "softcap", "mass", "min_length")
"""A problem's fields that say what is computed; block-sparse attention alone has the last two."""
ALIGNMENT: Final = 16
"""Bytes of one load."""
_MOST_PREPARED: Final = 64
_MOST_KEPT_BYTES: Final = 64 << 20
_MOST_KEPT_STREAMS: Final = 8


class Inputs(NamedTuple):
    """`query [B, H, S, D]`, `key [B, G, T, D]`, `value [B, G, T, Dv]`; lengths int32 `[B]` on the
    same device: `seqlens_k` (end of the row's keys, minus one), `prompt_length`, `first_valid`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    seqlens_k: Tensor
    prompt_length: Tensor
    first_valid: Tensor


@dataclass
class _Prepared:
    """A problem whose sizes but `S` and `T` are set, and the scratch of the last `S` and `T`."""

    kernels: CudaKernels
    problem: Any
    address: int
    sizes: tuple[int, int] = (-1, -1)
    workspace_bytes: int = 0


@dataclass
class _Thread(threading.local):
    """A thread's own: a problem is read while other threads run, and their launches are between.

    `scratch` is by stream, whose calls follow each other.
    """

    prepared: dict[tuple[Any, ...], _Prepared] = field(default_factory=dict)
    scratch: dict[tuple[int, int], Tensor] = field(default_factory=dict)


_thread: Final = _Thread()


def run_kernels(
    operator: str, inputs: Inputs, numbers: dict[str, float], block_mask: Tensor | None = None
) -> Tensor:
    """Enqueues one call on the current stream: `[B, H, S, Dv]`, which lies as `[B, S, H, Dv]`.

    `operator` is "triangle" or "block_sparse"; `numbers` are the fields of its problem that say
    what is computed. Keys and values are read where they are, also as the first `T` slots of a
    larger buffer; queries too, where they lie as `[B, S, H, D]`. Else they are copied.
    `block_mask` is the operator's optional output, uint8 `[B, H, C, C]`, `C = ceil(T / 128)` with
    the buffer's slots for `T`.

    Raises:
        ConfigurationError: tensors that are no call of the operator.
        LibraryNotFoundError: there is no CUDA library.
        RuntimeError: CUDA's own error.
    """
    ordered = tuple([numbers[name] for name in NUMBERS if name in numbers])
    return call_kernels(operator, *inputs, ordered, block_mask)


def call_kernels(
    operator: str, query: Tensor, key: Tensor, value: Tensor, end: Tensor, prompt: Tensor,
    first: Tensor, numbers: tuple[float, ...], block_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`run_kernels`, its arguments one by one and the numbers in the order of `NUMBERS`."""
    prepared = _prepare(operator, query, key, value, end, prompt, first, numbers)
    B, H, S, D = query.shape
    T, Dv = key.shape[2], value.shape[3]
    if T == 0 or S == 0 or B == 0:
        return query.new_zeros(B, S, H, Dv).transpose(1, 2)
    address = query.data_ptr()
    if query.stride() != (S * H * D, D, H * D, 1) or address % ALIGNMENT:
        query = aligned(query.transpose(1, 2)).transpose(1, 2)
        address = query.data_ptr()
    capacity = buffer_slots(key)
    if capacity is None or buffer_slots(value) != capacity:
        key, value, capacity = aligned(key), aligned(value), T
    if Dv == D:
        output = torch.empty_like(query)  # lies as the queries do
    else:
        output = query.new_empty_strided((B, H, S, Dv), (S * H * Dv, Dv, H * Dv, 1))
    problem = prepared.problem
    problem.query_length, problem.total = S, T
    problem.past_capacity = problem.present_capacity = capacity
    problem.query, problem.output = address, output.data_ptr()
    problem.past_key = problem.present_key = key.data_ptr()
    problem.past_value = problem.present_value = value.data_ptr()
    problem.seqlens_k = end.data_ptr()
    problem.prompt_length = prompt.data_ptr()
    problem.first_valid = first.data_ptr()
    if operator == "block_sparse":
        problem.block_mask = mask_address(block_mask, query, capacity)
    device = query.get_device()
    if device < 0 or device == current_device():
        _enqueue(prepared, query, (S, capacity))
    else:
        with torch.cuda.device(device):
            _enqueue(prepared, query, (S, capacity))
    return output


def mask_address(block_mask: Tensor | None, query: Tensor, keys: int) -> int | None:
    """Where the optional output lies; ConfigurationError where it is not uint8 `[B, H, C, C]`."""
    if block_mask is None:
        return None
    size = -(-keys // TILE)
    shape = [*query.shape[:2], size, size]
    if (
        block_mask.dtype != torch.uint8
        or list(block_mask.shape) != shape
        or not block_mask.is_contiguous()
        or block_mask.device != query.device
    ):
        raise ConfigurationError(
            f"block_mask is {block_mask.dtype} {list(block_mask.shape)} on {block_mask.device}, "
            f"but must be contiguous uint8 {shape} on {query.device}"
        )
    return block_mask.data_ptr()


def buffer_slots(x: Tensor) -> int | None:
    """Slots of the buffer `[B, G, slots, D]` whose first `T` the tensor `[B, G, T, D]` is.

    None where it is not that: other strides, an address that the kernels' loads do not take, or a
    buffer whose last slots do not exist.
    """
    if x.data_ptr() % ALIGNMENT:
        return None
    B, G, T, D = x.shape
    if x.is_contiguous():
        return T
    of_batch, of_head, of_slot, of_number = x.stride()
    span = of_head if G > 1 else of_batch
    slots = span // D
    if of_number != 1 or (of_slot != D and T > 1) or slots < T or span != slots * D:
        return None
    if B > 1 and of_batch != G * span:
        return None
    numbers = x.untyped_storage().nbytes() // x.element_size()
    return slots if x.storage_offset() + B * G * span <= numbers else None


def aligned(x: Tensor) -> Tensor:
    """Contiguous, at an address that the kernels' loads take."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def _enqueue(prepared: _Prepared, query: Tensor, sizes: tuple[int, int]) -> None:
    if prepared.sizes != sizes:
        prepared.workspace_bytes = prepared.kernels.workspace_bytes(prepared.address)
        prepared.sizes = sizes
    launch(prepared.kernels, prepared.address, prepared.workspace_bytes, query)


def launch(kernels: CudaKernels, address: int, workspace_bytes: int, query: Tensor) -> None:
    """Enqueues the problem at `address` on the current stream of the queries' device.

    That device has to be the current one.

    Raises:
        RuntimeError: what the kernels do not take, or CUDA's own error.
    """
    stream = current_stream(query.get_device())
    workspace = _scratch(workspace_bytes, query, stream)
    error = kernels.run(address, workspace.data_ptr(), stream)
    if error:
        raise RuntimeError(f"the CUDA kernels say: {error.decode()}")


def _scratch(count: int, query: Tensor, stream: int) -> Tensor:
    """`count` bytes beside `query`: the stream's, or, for a graph that is captured, its own."""
    if is_capturing() or count > _MOST_KEPT_BYTES:
        return query.new_empty(count, dtype=torch.uint8)
    place = query.get_device(), stream
    kept = _thread.scratch.get(place)
    if kept is None or kept.nbytes < count:
        if len(_thread.scratch) >= _MOST_KEPT_STREAMS:
            _thread.scratch.clear()
        kept = _thread.scratch[place] = query.new_empty(count, dtype=torch.uint8)
    return kept


_torch: Final[Any] = torch._C
"""torch's own functions for what follows look at more, and take some microseconds."""


def current_stream(device: int) -> int:
    """The device's current stream as CUDA knows it."""
    stream: int = _torch._cuda_getCurrentRawStream(device)
    return stream


def current_device() -> int:
    """The number of the current CUDA device."""
    device: int = _torch._cuda_getDevice()
    return device


def is_capturing() -> bool:
    """Whether the current stream's work is recorded as a graph."""
    capturing: bool = _torch._cuda_isCurrentStreamCapturing()
    return capturing


def _prepare(
    operator: str, query: Tensor, key: Tensor, value: Tensor, end: Tensor, prompt: Tensor,
    first: Tensor, numbers: tuple[float, ...],
) -> _Prepared:  # fmt: skip
    """By all that the problem's fixed part and the checks depend on."""
    of_query, of_key, of_value = query.shape, key.shape, value.shape
    index = query.get_device()
    if index < 0 or not len(of_query) == len(of_key) == len(of_value) == 4:
        # Of no GPU: tensors on the host and nowhere have the same number.
        check_inputs(Inputs(query, key, value, end, prompt, first))
    signature = (
        operator, numbers,
        of_query[0], of_query[1], of_query[3], of_key[0], of_key[1], of_key[3],
        of_value[0], of_value[1], of_value[3], of_key[2] == of_value[2],
        query.dtype, key.dtype, value.dtype, end.dtype, prompt.dtype, first.dtype,
        index, key.get_device(), value.get_device(),
        end.get_device(), prompt.get_device(), first.get_device(),
        end.shape, prompt.shape, first.shape,
        end.is_contiguous(), prompt.is_contiguous(), first.is_contiguous(),
    )  # fmt: skip
    prepared = _thread.prepared.get(signature)
    if prepared is None:
        inputs = Inputs(query, key, value, end, prompt, first)
        check_inputs(inputs)
        if len(_thread.prepared) >= _MOST_PREPARED:
            _thread.prepared.clear()
        prepared = _thread.prepared[signature] = _new_problem(operator, inputs, numbers)
    return prepared


def check_inputs(inputs: Inputs) -> None:
    """Raises ConfigurationError for tensors that are no call of the operators."""
    query, key, value = inputs.query, inputs.key, inputs.value
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ConfigurationError(
            f"query is {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)}, "
            "but must be [B, H, S, D], [B, G, T, D] and [B, G, T, Dv]"
        )
    if key.shape[:3] != value.shape[:3]:
        raise ConfigurationError(
            f"key is {list(key.shape)} and value {list(value.shape)}, but they must agree in "
            "batch, heads and tokens"
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ConfigurationError(
            f"query is {list(query.shape)} and key {list(key.shape)}, but they must agree in batch "
            "and head size"
        )
    AttentionShape(query.shape[1], key.shape[1], query.shape[3], value.shape[3])
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype:
        raise ConfigurationError(
            f"query is {query.dtype}, key {key.dtype} and value {value.dtype}, but must be one of "
            "float32, float16, bfloat16, and the same"
        )
    lengths = {name: getattr(inputs, name) for name in Inputs._fields[3:]}
    check_lengths(lengths, query.shape[0])
    check_devices(query, key, value, *lengths.values())


def check_lengths(lengths: dict[str, Tensor], batch: int) -> None:
    """Raises ConfigurationError for lengths, by their names, that are not int32 `[batch]`."""
    for name, x in lengths.items():
        if x.dtype != torch.int32 or x.shape != (batch,) or not x.is_contiguous():
            raise ConfigurationError(
                f"{name} is {x.dtype} {list(x.shape)}, but must be contiguous int32 [{batch}]"
            )


def check_devices(query: Tensor, *others: Tensor) -> None:
    """Raises ConfigurationError for tensors that are not where the queries are."""
    if any(x.device != query.device for x in others):
        raise ConfigurationError(
            f"query is on {query.device}, but its other tensors are on "
            f"{sorted({str(x.device) for x in others})}; put all on one device"
        )


def _new_problem(operator: str, inputs: Inputs, numbers: tuple[float, ...]) -> _Prepared:
    kernels = load_kernels(*_ENTRIES[operator])
    fields = dict(zip(NUMBERS, numbers, strict=False))
    problem: Problem = kernels.problem(dtype=DTYPES[inputs.query.dtype], **fields)
    B, H, _, D = inputs.query.shape
    G, Dv = inputs.value.shape[1], inputs.value.shape[3]
    problem.batch, problem.num_heads, problem.kv_num_heads = B, H, G
    problem.head_size, problem.value_head_size = D, Dv
    problem.query_stride, problem.key_stride, problem.value_stride = H * D, G * D, G * Dv
    return _Prepared(kernels, problem, ctypes.addressof(problem))
