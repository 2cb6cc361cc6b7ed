"""transformers' own `OnnxExporter`, plain and with its fusions for ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any, Final

from source_models.routes.worker import work

_NAME: Final = re.compile(r"onnx-exporter(?:-(cpu|cuda|dml))?")


def make(route: str, folder: Path, target: Path) -> None:
    """`onnx-exporter`, or with the provider whose fusions it applies: `onnx-exporter-cpu`."""
    from transformers import AutoModelForCausalLM
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    name = _NAME.fullmatch(route)
    assert name, f"{route} is not a route of the OnnxExporter"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    config = OnnxConfig(dynamic=True, opset_version=20, ort_fusions=name[1])  # type: ignore[arg-type]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        exported = OnnxExporter().export(model, _inputs(model.config), config=config)
        exported.save_pretrained(target)


def _inputs(config: Any) -> dict[str, Any]:
    import torch
    from transformers import DynamicCache

    batch, length, past = 2, 3, 5
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = DynamicCache()  # without the config: a sliding cache bakes its cut into the graph
    for layer in range(config.num_hidden_layers):
        cache.update(
            torch.randn(batch, heads, past, size), torch.randn(batch, heads, past, size), layer
        )
    return {
        "input_ids": torch.arange(batch * length).reshape(batch, length) + 3,
        "attention_mask": torch.ones(batch, past + length, dtype=torch.int64),
        "position_ids": torch.arange(past, past + length).expand(batch, -1).contiguous(),
        "past_key_values": cache,
    }


if __name__ == "__main__":
    sys.exit(work(make))
