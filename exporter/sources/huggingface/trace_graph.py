"""A transformers model as an ONNX file: traced without weights, which are attached afterwards."""

from __future__ import annotations

import contextlib
import linecache
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from onnx_ir.passes import common as common_passes
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface
from trianglemix.custom_ops import contract
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.sources.huggingface.operator_in_torch import (
    AttentionTrace,
    HandThroughLayer,
    Lengths,
    classify_mask,
    register_symbolics,
)
from trianglemix.exporter.sources.huggingface.refusals import ONNX_ROUTE, refuse_missing_layers

OPSET: Final = 18
IMPLEMENTATION: Final = "trianglemix_export"
"""Name under which transformers finds the attention and its mask while a model is exported."""


@dataclass(frozen=True)
class CacheSizes:
    """One layer's KV cache: `[B, kv_num_heads, P, head_size]`, values `value_head_size`."""

    kv_num_heads: int
    head_size: int
    value_head_size: int


class FlatModel(torch.nn.Module):
    """The model with flat tensors for its cache, whose attention is the operator.

    `forward(input_ids [B, S], attention_mask [B, T], position_ids [B, S], past)` with
    `past = [key, value] * layers` returns logits `[B, S, vocabulary]` and the presents.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._trace: AttentionTrace | None = None
        self._measuring = False
        AttentionInterface.register(IMPLEMENTATION, self._attend)
        AttentionMaskInterface.register(IMPLEMENTATION, classify_mask)
        model.set_attn_implementation(IMPLEMENTATION)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        layers = [HandThroughLayer(*past[n : n + 2]) for n in range(0, len(past), 2)]
        lengths = Lengths.from_mask(attention_mask)
        self._trace = trace = AttentionTrace(lengths, layers, self._measuring)
        logits = self.model(
            input_ids=input_ids,
            attention_mask=None,  # the lengths say it all: no mask is built
            position_ids=position_ids,
            past_key_values=Cache(layers=layers),
            use_cache=True,
        ).logits
        entered = sorted(trace.present)
        refuse_missing_layers(self.model, sorted(set(range(len(layers))) - set(entered)), entered)
        return (logits, *(x for layer in range(len(layers)) for x in trace.present[layer]))

    def measure_caches(self) -> tuple[CacheSizes, ...]:
        """What each layer hands to its attention, whatever transformers keeps in its cache.

        Raises:
            RefusedError: a layer computes something that the operator does not.
        """
        count = _count_layers(self.model)
        ids = torch.arange(3, 7)[None]
        empty = [torch.zeros(1, 1, 0, 1) for _ in range(2 * count)]
        self._measuring = True
        try:
            with torch.no_grad():
                _, *present = self(ids, torch.ones_like(ids), torch.arange(4)[None], empty)
        except IndexError as error:
            if "list index" not in str(error):
                raise
            raise RefusedError(
                f"{type(self.model).__name__} keeps more caches than it numbers attention modules "
                f"({count}): a layer calls attention more than once; this model cannot be exported"
            ) from error
        self._measuring = False
        return tuple(
            CacheSizes(key.shape[1], key.shape[3], value.shape[3])
            for key, value in zip(present[::2], present[1::2], strict=True)
        )

    def close(self) -> None:
        """Takes the model out of transformers' registry, so that its memory can go."""
        AttentionInterface.register(IMPLEMENTATION, _closed)

    def _attend(self, *arguments: Any, **named: Any) -> tuple[torch.Tensor, None]:
        assert self._trace is not None, "attention runs inside forward only"
        return self._trace.attend(*arguments, **named)


def _count_layers(model: Any) -> int:
    """By the numbers of its attention modules; a decoder's configuration may count an encoder."""
    numbers = [getattr(module, "layer_idx", None) for module in model.modules()]
    known = [number for number in numbers if isinstance(number, int)]
    return max(known) + 1 if known else int(model.config.get_text_config().num_hidden_layers)


def _closed(*_: Any, **__: Any) -> tuple[torch.Tensor, None]:
    raise AssertionError("attention runs inside FlatModel.forward only")


def example_inputs(sizes: Sequence[CacheSizes], dtype: torch.dtype) -> tuple[Any, ...]:
    """Two rows of three new tokens after five old ones; the second row starts at slot 2."""
    batch, length, past = 2, 3, 5
    generator = torch.Generator().manual_seed(0)
    cache = [
        torch.randn(batch, layer.kv_num_heads, past, size, generator=generator).to(dtype)
        for layer in sizes
        for size in (layer.head_size, layer.value_head_size)
    ]
    mask = torch.ones(batch, past + length, dtype=torch.int64)
    mask[1, :2] = 0
    positions = mask.cumsum(1)[:, past:] - 1
    return torch.arange(batch * length).reshape(batch, length) + 3, mask, positions, cache


def write_onnx(flat: FlatModel, sizes: Sequence[CacheSizes], path: Path) -> None:
    """Traces the model and writes `path` with its weights in `<path>.data`.

    Memory: the model as torch holds it, and a copy of its largest weight.

    Raises:
        RefusedError: tracing would freeze something that depends on the input.
    """
    dtype = next(flat.parameters()).dtype
    path.parent.mkdir(parents=True, exist_ok=True)
    graph_only = path.with_name(f"{path.name}.graph")
    _trace(flat, example_inputs(sizes, dtype), len(sizes), graph_only)
    model = ir.load(graph_only)
    graph_only.unlink()
    _attach_weights(model.graph, flat)
    common_passes.RemoveUnusedNodesPass()(model)
    ir.save(model, path, external_data=f"{path.name}.data")


def graph_names(layers: int) -> tuple[list[str], list[str]]:
    """Names of the graph's inputs and outputs, in order."""
    pairs = [(layer, part) for layer in range(layers) for part in ("key", "value")]
    return (
        ["input_ids", "attention_mask", "position_ids"]
        + [f"past_key_values.{layer}.{part}" for layer, part in pairs],
        ["logits"] + [f"present.{layer}.{part}" for layer, part in pairs],
    )


def _trace(flat: FlatModel, arguments: tuple[Any, ...], layers: int, path: Path) -> None:
    """Writes the graph alone: parameters are inputs of it, so no copy of them is made."""
    inputs, outputs = graph_names(layers)
    batch, length, past, total = "batch", "sequence", "past_sequence", "total_sequence"
    axes = {name: {0: batch, 1: length} for name in ("input_ids", "position_ids", "logits")}
    axes["attention_mask"] = {0: batch, 1: total}
    axes |= {name: {0: batch, 2: past} for name in inputs[3:]}
    axes |= {name: {0: batch, 2: total} for name in outputs[1:]}
    register_symbolics(OPSET)
    with refuse_frozen_values(), torch.no_grad():
        torch.onnx.export(
            flat,
            arguments,
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=axes,
            export_params=False,
            do_constant_folding=False,
            custom_opsets={contract.DOMAIN: contract.OP_VERSION},
        )


class FrozenDecisionError(RefusedError):
    """The model's code decides by its input, which a trace would freeze."""


@contextlib.contextmanager
def refuse_frozen_values() -> Iterator[None]:
    """A trace that turns a tensor into a Python value would be wrong for every other input."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    torch_code = str(Path(torch.__file__).parent)  # its own argument checks, not data flow
    for warning in caught:
        traced = warning.category.__name__ == "TracerWarning"
        if str(warning.message).startswith("torch.tensor results are registered as constants"):
            continue  # made of a Python constant: data in it would have warned by itself
        if not traced or warning.filename.startswith(torch_code):
            continue
        if _compares_shapes(linecache.getline(warning.filename, warning.lineno)):
            continue  # the same for every input, or one of the checked sizes would differ
        raise FrozenDecisionError(
            f"the model's code decides by its input at {Path(warning.filename).name}:"
            f"{warning.lineno}, which a graph cannot follow; {ONNX_ROUTE}"
        )


def _compares_shapes(line: str) -> bool:
    """Whether a line asks only whether two tensors have the same sizes."""
    sides = re.split(r"[=!]=", line)
    return len(sides) == 2 and all(".shape" in side for side in sides)


def _attach_weights(graph: ir.Graph, flat: FlatModel) -> None:
    """Turns the graph's parameter inputs into initializers that read torch's memory when saved."""
    parameters = {**dict(flat.named_buffers()), **dict(flat.named_parameters())}
    for value in list(graph.inputs):
        if value.name not in parameters:
            continue
        graph.inputs.remove(value)
        weight = parameters[value.name].detach()
        for node, _ in list(value.uses()):
            if node.op_type != "Transpose":
                continue
            order = node.attributes["perm"].as_ints()
            name = ".".join([str(value.name), "transposed", *map(str, order)])
            folded = _initializer(graph, name, weight.permute(*order))
            node.outputs[0].replace_all_uses_with(folded)
            graph.remove(node, safe=True)
        if value.uses():
            value.replace_all_uses_with(_initializer(graph, f"{value.name}.weight", weight))


def _initializer(graph: ir.Graph, name: str, weight: torch.Tensor) -> ir.Value:
    if name not in graph.initializers:
        tensor = tensor_adapters.TorchTensor(weight, name=name)
        graph.register_initializer(ir.val(name, const_value=tensor))
    return graph.initializers[name]
