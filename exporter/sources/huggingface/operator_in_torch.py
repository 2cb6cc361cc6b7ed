"""The operator inside a torch model: what a transformers model calls instead of its attention."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch.onnx import symbolic_helper
from transformers.cache_utils import DynamicLayer
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.triangle.contract import OP_TYPE
from trianglemix.exporter.errors import RefusedError
from trianglemix.hf.attention_arguments import describe_arguments, unknown_arguments

_NO_LAST_ROWS: Final = 2**31 - 1
"""prompt_length of an already windowed layer: no row is ever one of the dense last rows."""


@torch.library.custom_op("trianglemix::triangle_attention", mutates_args=())
def triangle_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    seqlens_k: torch.Tensor,
    total_sequence_length: torch.Tensor,
    prompt_length: torch.Tensor,
    first_valid: torch.Tensor,
    num_heads: int,
    kv_num_heads: int,
    head_size: int,
    value_head_size: int,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator, with heads apart: q `[B, H, S, D]`, k and v `[B, G, S, D]`, output
    `[B, S, H, Dv]`. Dense for window -1, else exactly a sliding window.

    This body runs while a model is traced and checked: a growing cache whose rows end together.
    `torch.ops.trianglemix.attend_triangle` is another: it runs models and appends nothing.
    """
    length, group = query.shape[2], num_heads // kv_num_heads
    present_key, present_value = torch.cat((past_key, key), 2), torch.cat((past_value, value), 2)
    k, v = (x.repeat_interleave(group, dim=1).float() for x in (present_key, present_value))
    scores = query.float() @ k.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    j = torch.arange(k.shape[2])
    i = j[-length:, None]
    kept = (j <= i) & (j >= first_valid[:, None, None, None])
    if window != contract.DENSE_WINDOW:
        kept = kept & (i - j < window)
    weights = torch.softmax(scores.masked_fill(~kept, float("-inf")), dim=-1).nan_to_num()
    output = (weights @ v).transpose(1, 2).to(query.dtype).contiguous()
    return output, present_key, present_value


def _symbolic(g: Any, query: Any, key: Any, value: Any, *others: Any) -> Any:
    """The ONNX nodes of the op above, for torch's TorchScript exporter."""
    inputs = len(contract.INPUTS) - 3
    constant_of: Any = symbolic_helper._get_const
    heads, kv_heads, size, value_size, scale, softcap, window = (
        constant_of(constant, kind, "attribute")
        for constant, kind in zip(others[inputs:], "iiiiffi", strict=True)
    )
    merged = g.op("Constant", value_t=torch.tensor([0, 0, -1]))
    rows = [
        g.op("Reshape", g.op("Transpose", x, perm_i=[0, 2, 1, 3]), merged)
        for x in (query, key, value)
    ]
    output, present_key, present_value = g.op(
        f"{contract.DOMAIN}::{OP_TYPE}",
        *rows,
        *others[:inputs],
        outputs=len(contract.OUTPUTS),
        **{
            f"{contract.ATTR_NUM_HEADS}_i": heads,
            f"{contract.ATTR_KV_NUM_HEADS}_i": kv_heads,
            f"{contract.ATTR_SCALE}_f": scale,
            f"{contract.ATTR_SOFTCAP}_f": softcap,
            f"{contract.ATTR_SINK}_i": 0,
            f"{contract.ATTR_WINDOW}_i": window,
            f"{contract.ATTR_LAST}_i": 1,
        },
    )
    past = others[0].type()
    output.setType(past.with_sizes([None, None, heads * value_size]))
    present_key.setType(past.with_sizes([None, kv_heads, None, size]))
    present_value.setType(past.with_sizes([None, kv_heads, None, value_size]))
    apart = g.op("Constant", value_t=torch.tensor([0, 0, heads, value_size]))
    return g.op("Reshape", output, apart), present_key, present_value


def _repeat_last_axis(g: Any, x: Any, repeats: Any, dim: Any, *_: Any) -> Any:
    """`repeat_interleave(x, r, dim=-1)`, which RoPE of some models needs; torch's own form of it
    freezes sizes, and crashes for some models.
    """
    constant_of: Any = symbolic_helper._get_const
    count, axis = constant_of(repeats, "i", "repeats"), constant_of(dim, "i", "dim")
    if not isinstance(count, int) or axis != -1:
        raise RefusedError(
            f"the model repeats a tensor's entries along axis {axis}, which has no ONNX form here; "
            "this model cannot be exported"
        )
    apart = g.op("Unsqueeze", x, g.op("Constant", value_t=torch.tensor([-1])))
    copies = g.op("Concat", *([apart] * count), axis_i=-1)
    outer = g.op("Shape", x, end_i=-1)
    shape = g.op("Concat", outer, g.op("Constant", value_t=torch.tensor([-1])), axis_i=0)
    return g.op("Reshape", copies, shape)


def _expm1(g: Any, x: Any) -> Any:
    """`exp(x) - 1 = 2 t / (1 - t)` with `t = tanh(x / 2)`, which keeps the digits near 0."""

    def constant(number: float) -> Any:
        return g.op("CastLike", g.op("Constant", value_t=torch.tensor(number)), x)

    half = g.op("Tanh", g.op("Div", x, constant(2.0)))
    near = g.op("Div", g.op("Mul", half, constant(2.0)), g.op("Sub", constant(1.0), half))
    far = g.op("Sub", g.op("Exp", x), constant(1.0))
    return g.op("Where", g.op("Less", x, constant(1.0)), near, far)


def register_symbolics(opset: int) -> None:
    """Tells torch's exporter how to write the ops; repeated calls are harmless."""
    torch_onnx: Any = torch.onnx  # not in the list of what the module exports
    register = torch_onnx.register_custom_op_symbolic
    register("trianglemix::triangle_attention", _symbolic, opset)
    register("aten::repeat_interleave", _repeat_last_axis, opset)
    register("aten::expm1", _expm1, opset)


class HandThroughLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's cache that keeps the past and hands new keys and values through unchanged."""

    def __init__(self, past_key: torch.Tensor, past_value: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = past_key, past_value  # [B, G, P, D], [B, G, P, Dv]
        self.dtype, self.device = past_key.dtype, past_key.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The operator appends; nothing is concatenated here."""
        return key_states, value_states

    def get_seq_length(self, *_: Any) -> int:
        """`P`, without the base class's branch on an empty past (a trace would freeze it)."""
        return self.keys.shape[2]


class _MaskUsedError(RefusedError, AttributeError):
    """Also an AttributeError, so that `hasattr` of a mask stays a question."""


@dataclass(frozen=True)
class TracedMask:
    """What a model holds for its attention mask while it is exported.

    `unknown` says what is asked for where it is neither causal nor a window. Only an attention
    that uses such a mask refuses it: decoders make one for an encoder that is not there.
    """

    window: int  # tokens, the row itself included; contract.DENSE_WINDOW = causal
    unknown: str | None = None

    def __getattr__(self, name: str) -> Any:
        raise _MaskUsedError(
            f"the model computes with its attention mask ({name}), so it makes a mask of its own, "
            "whose meaning is unknown; this model cannot be exported"
        )


def classify_mask(
    *_: Any, mask_function: Any = None, local_size: int | None = None, **__: Any
) -> TracedMask:
    """transformers' mask interface: measures which mask a model wants, and builds none.

    The signature differs between transformers 4.57 and 5; only the two arguments that both hand
    over by name are read.
    """
    window = contract.DENSE_WINDOW if local_size is None else int(local_size)
    edges = sorted({0, 1, 2, 3, 17, *(max(0, window + d) for d in (-1, 0, 1, window))})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a trace sees constants here, and they are constant
        i, j = torch.tensor(edges)[:, None], torch.tensor(edges)[None, :]
        zero = torch.tensor(0)
        expected = j <= i if local_size is None else (j <= i) & (i - j < window)
        try:
            measured = None if mask_function is None else mask_function(zero, zero, i, j)
        except IndexError:  # it looks its rows up in the input
            measured = None
        if measured is None or not torch.equal(measured.expand_as(expected), expected):
            return TracedMask(window, _name_of_mask(mask_function, local_size))
    return TracedMask(window)


def _name_of_mask(mask_function: Any, local_size: int | None) -> str:
    parts = [mask_function, *(_parts(mask_function) if mask_function is not None else ())]
    names = " ".join(getattr(part, "__qualname__", "") for part in parts)
    kinds = {
        "chunked": f"chunked attention (chunks of {local_size} tokens)",
        "bidirectional": "attention that is not causal",
        "or_mask": "attention that is not causal between some tokens",
        "packed_sequence": "attention within packed sequences",
        "blockwise_overlay": "attention that is not causal inside blocks of tokens",
    }
    return next((kind for word, kind in kinds.items() if word in names), "an unknown mask")


def _parts(mask_function: Any) -> list[Any]:
    """The functions that a mask of transformers' `and_masks` or `or_masks` is made of."""
    cells = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    return [part for cell in cells if isinstance(cell, tuple) for part in cell]


@dataclass(frozen=True)
class Lengths:
    """The operator's lengths, shared by all layers: int32, `[B]`, the total a scalar.

    The rule of a growing cache with left padding: every row ends at `T`.
    """

    seqlens_k: torch.Tensor
    total_sequence_length: torch.Tensor
    prompt_length: torch.Tensor
    first_valid: torch.Tensor
    no_last_rows: torch.Tensor  # prompt_length of layers that are windowed already

    @classmethod
    def from_mask(cls, mask: torch.Tensor) -> Lengths:
        """Reads them from an attention mask `[B, T]`, 1 = a real token."""
        first_valid = torch.argmax(mask, dim=1).to(torch.int32)
        total = torch.scalar_tensor(mask.shape[1], dtype=torch.int32)
        prompt_length = torch.zeros_like(first_valid) + total
        return cls(
            seqlens_k=prompt_length - 1,
            total_sequence_length=total,
            prompt_length=prompt_length,
            first_valid=first_valid,
            no_last_rows=torch.full_like(first_valid, _NO_LAST_ROWS),
        )


@dataclass
class AttentionTrace:
    """The state of one forward pass: lengths and pasts in, presents of the layers out."""

    lengths: Lengths
    layers: list[HandThroughLayer]
    measuring: bool = False  # the caches' sizes are not known yet: every past is empty
    present: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    windows: dict[int, int] = field(default_factory=dict)

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        sliding_window: int | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' attention interface: q `[B, H, S, D]`, k and v `[B, G, S, D]` (new tokens).

        Raises:
            RefusedError: the layer computes something that the operator does not.
        """
        layer = self._layer_index(module)
        refuse_unknown(layer, module, attention_mask, others)
        window = attention_mask.window
        lengths = self.lengths
        dense = window == contract.DENSE_WINDOW
        past_key, past_value = self._past(layer, key, value)
        shape = _shape(query, key, value)
        output, present_key, present_value = triangle_attention(
            query,
            key,
            value,
            past_key,
            past_value,
            lengths.seqlens_k,
            lengths.total_sequence_length,
            lengths.prompt_length if dense else lengths.no_last_rows,
            lengths.first_valid,
            shape.num_heads,
            shape.kv_num_heads,
            shape.head_size,
            shape.value_head_size,
            float(scaling if scaling is not None else shape.head_size**-0.5),
            float(softcap or 0.0),
            window,
        )
        self.present[layer], self.windows[layer] = (present_key, present_value), window
        return output, None

    def _past(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.measuring:
            return key[:, :, :0], value[:, :, :0]
        return self.layers[layer].keys, self.layers[layer].values

    def _layer_index(self, module: Any) -> int:
        name, layer = type(module).__name__, getattr(module, "layer_idx", None)
        if layer is None:
            raise RefusedError(
                f"{name} calls attention without the layer's number; this model cannot be exported"
            )
        if layer in self.present:
            raise RefusedError(
                f"{name} calls attention a second time in layer {layer}, but a layer of the graph "
                "has one attention and one cache; this model cannot be exported"
            )
        return int(layer)


def refuse_unknown(layer: int, module: Any, mask: Any, others: dict[str, Any]) -> None:
    """Raises RefusedError for arguments or a mask that change what the attention computes."""
    where = f"layer {layer} ({type(module).__name__})"
    strange = unknown_arguments(others)
    if strange:
        raise RefusedError(
            f"{where} hands {describe_arguments(strange)} to its attention, which the operator "
            "does not compute; this model cannot be exported"
        )
    if not isinstance(mask, TracedMask):
        raise RefusedError(
            f"{where} makes its own attention mask ({type(mask).__name__}), whose meaning is "
            "unknown; this model cannot be exported"
        )
    if mask.unknown is not None:
        raise RefusedError(
            f"{where} asks for a mask that is neither causal nor a sliding window: {mask.unknown}; "
            "this model cannot be exported"
        )


def _shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> contract.AttentionShape:
    """Head layout; raises ConfigurationError for sizes that the operator does not take."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes of weights: the same for every input
        sizes = (int(query.shape[1]), int(key.shape[1]), int(query.shape[3]), int(value.shape[3]))
    return contract.AttentionShape(*sizes)
