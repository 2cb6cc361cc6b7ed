"""Plain ONNX models as users have them: a transformers model through torch's own exporters."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

Route = Literal["dynamo", "torchscript"]
Attention = Literal["sdpa", "eager"]

_BATCH, _LENGTH, _PAST, _TOTAL = "batch", "sequence", "past_sequence", "total_sequence"


@dataclass(frozen=True)
class PlainExport:
    """How to export: torch's exporter, the attention implementation to decompose, the opset."""

    route: Route = "torchscript"
    attention: Attention = "sdpa"
    opset: int = 18


class _FlatCacheModel(torch.nn.Module):
    """The model with its KV cache as a flat list of tensors, `[key, value] * layers`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache()  # without the config: a sliding cache bakes its cut into the graph
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        logits = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).logits
        present = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return (logits, *present)


def export_plain(folder: Path, path: Path, export: PlainExport) -> None:
    """Exports the model of a Hugging Face folder to `path`, weights in `<path>.data` beside it.

    Inputs are input_ids `[B, S]`, attention_mask `[B, T]`, position_ids `[B, S]` and
    `past_key_values.N.{key,value}` `[B, G, P, D]`; outputs logits and `present.N.{key,value}`.
    Everything is float32 with dynamic axes.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=export.attention, dtype=torch.float32
    ).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    arguments = _example(model.config)
    flat = _FlatCacheModel(model).eval()
    with _quiet(), torch.no_grad():
        if export.route == "dynamo":
            _export_dynamo(flat, arguments, path, export.opset)
        else:
            _export_torchscript(flat, arguments, path, export.opset)


def input_names(layers: int) -> tuple[list[str], list[str]]:
    """Input and output names of a model with `layers` layers, in graph order."""
    pairs = [(layer, part) for layer in range(layers) for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids"]
    return (
        inputs + [f"past_key_values.{layer}.{part}" for layer, part in pairs],
        ["logits"] + [f"present.{layer}.{part}" for layer, part in pairs],
    )


def _example(config: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Small inputs: two rows, three new tokens after five old ones."""
    batch, length, past = 2, 3, 5
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        torch.arange(batch * length).reshape(batch, length) + 3,
        torch.ones(batch, past + length, dtype=torch.int64),
        torch.arange(past, past + length).expand(batch, -1).contiguous(),
        [torch.zeros(batch, heads, past, size) for _ in range(2 * config.num_hidden_layers)],
    )


def _export_dynamo(flat: torch.nn.Module, arguments: Any, path: Path, opset: int) -> None:
    past = arguments[3]
    inputs, outputs = input_names(len(past) // 2)
    shapes = {
        "input_ids": {0: _BATCH, 1: _LENGTH},
        "attention_mask": {0: _BATCH, 1: _TOTAL},
        "position_ids": {0: _BATCH, 1: _LENGTH},
        "past": [{0: _BATCH, 2: _PAST} for _ in past],
    }
    program = torch.onnx.export(
        flat,
        arguments,
        dynamo=True,
        opset_version=opset,
        input_names=inputs,
        output_names=outputs,
        dynamic_shapes=shapes,
        verbose=False,
    )
    assert program is not None
    program.save(str(path), external_data=True)


def _export_torchscript(flat: torch.nn.Module, arguments: Any, path: Path, opset: int) -> None:
    import onnx_ir as ir

    inputs, outputs = input_names(len(arguments[3]) // 2)
    axes = {
        "input_ids": {0: _BATCH, 1: _LENGTH},
        "attention_mask": {0: _BATCH, 1: _TOTAL},
        "position_ids": {0: _BATCH, 1: _LENGTH},
        "logits": {0: _BATCH, 1: _LENGTH},
    }
    axes |= {name: {0: _BATCH, 2: _PAST} for name in inputs[3:]}
    axes |= {name: {0: _BATCH, 2: _TOTAL} for name in outputs[1:]}
    raw = path.with_name(f"raw-{path.name}")
    torch.onnx.export(
        flat,
        arguments,
        str(raw),
        dynamo=False,
        opset_version=opset,
        input_names=inputs,
        output_names=outputs,
        dynamic_axes=axes,
    )
    ir.save(ir.load(raw), path, external_data=f"{path.name}.data")
    raw.unlink()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters print progress and warnings by the page; errors still come as exceptions."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
    ):
        warnings.simplefilter("ignore")
        yield
