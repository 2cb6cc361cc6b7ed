"""What transformers computes for a small batch, and whether a written ONNX file computes it too."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from trianglemix.custom_ops.operators import add_function
from trianglemix.custom_ops.triangle.contract import OP_TYPE
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.graph.ort import import_onnxruntime
from trianglemix.exporter.sources.huggingface.trace_graph import CacheSizes, graph_names

_PROMPT: Final = 13  # tokens; other sizes than those of the trace, so that frozen ones show
_SPLIT: Final = 9
_PADS: Final = (0, 2, 5)  # on the left of each row
_FIRST_ID: Final = 3  # ids of pads may count as no token at all
_TOLERANCE: Final = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}  # of the largest logit

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """Token ids, mask and positions `[B, N]`, and transformers' logits `[B, N, vocabulary]`."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    logits: NDArray[np.float32]
    dtype: str
    model_class: str

    def refuse_difference(self, logits: NDArray[np.float32], what: str) -> None:
        """Compares the real tokens' logits `[B, N, vocabulary]`.

        Raises:
            RefusedError: they differ, so something was not understood.
        """
        wrong = np.abs(logits - self.logits).max(-1) * self.mask.numpy()
        worst = float(wrong.max() / np.abs(self.logits).max())
        _logger.info("%s against transformers: %.1e of the largest logit", what, worst)
        allowed = _TOLERANCE[self.dtype]
        if not worst <= allowed:
            raise RefusedError(
                f"{what} gives logits that are off by {worst:.1e} of the largest (allowed "
                f"{allowed:.0e}): {self.model_class} computes something that is not understood; "
                "this model cannot be exported"
            )

    def chunks(self) -> tuple[slice, slice]:
        """The prompt in two steps, the second with a past."""
        return slice(0, _SPLIT), slice(_SPLIT, _PROMPT)


def compute_reference(model: Any) -> Reference:
    """One pass of transformers' own attention over the batch.

    Raises:
        RefusedError: positions count otherwise than 0, 1, 2 ... from a row's first token, or the
            logits are no numbers.
    """
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    count = torch.arange(len(_PADS) * _PROMPT).reshape(len(_PADS), _PROMPT)
    ids = _FIRST_ID + count * 7 % max(1, vocabulary - _FIRST_ID)
    mask = (torch.arange(_PROMPT)[None] >= torch.tensor(_PADS)[:, None]).to(torch.int64)
    positions = (mask.cumsum(1) - 1).clamp(min=0) + _shifts(model.config)
    with torch.no_grad():
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
        unpadded = model(input_ids=ids[:1], use_cache=False).logits
    _refuse_not_finite(model, logits)
    dtype = str(model.dtype).removeprefix("torch.")
    name = type(model).__name__
    reference = Reference(ids, mask, positions, logits.float().numpy(), dtype, name)
    difference = np.abs(unpadded.float().numpy()[0] - reference.logits[0]).max()
    if not difference <= _TOLERANCE[dtype] * np.abs(reference.logits).max():
        raise RefusedError(
            f"{name} does not count the positions of a prompt's tokens 0, 1, 2 ..., which is what "
            "position_ids of the graph would be given; this model cannot be exported"
        )
    return reference


def _refuse_not_finite(model: Any, logits: torch.Tensor) -> None:
    if bool(torch.isfinite(logits).all()):
        return
    bad = [name for name, x in model.state_dict().items() if not bool(torch.isfinite(x).all())]
    why = f"its weight {bad[0]} holds such" if bad else f"{model.dtype} overflows"
    raise RefusedError(
        f"{type(model).__name__} gives logits that are no finite numbers, in transformers already: "
        f"{why}; give whole weights, or another type"
    )


def _shifts(config: Any) -> torch.Tensor:
    """`[B, 1]`: where each row starts, up to the end of the context.

    What acts on far positions only (a scale that grows with them) is checked too.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or _PROMPT
    last = max(0, int(limit) - _PROMPT)
    return torch.tensor([[0], [last // 2], [last]])


def check_traced_model(
    flat: torch.nn.Module, sizes: Sequence[CacheSizes], reference: Reference
) -> None:
    """The model with the operator in its attention, still in torch.

    Raises:
        RefusedError: its logits differ.
    """
    past = [
        torch.zeros(len(_PADS), layer.kv_num_heads, 0, size, dtype=getattr(torch, reference.dtype))
        for layer in sizes
        for size in (layer.head_size, layer.value_head_size)
    ]
    logits = []
    with torch.no_grad():
        for rows in reference.chunks():
            ids, positions = reference.ids[:, rows], reference.positions[:, rows]
            chunk, *past = flat(ids, reference.mask[:, : rows.stop], positions, past)
            logits.append(chunk.float().numpy())
    reference.refuse_difference(
        np.concatenate(logits, 1), "the model with the operator in its attention"
    )


def check_written_file(path: Path, sizes: Sequence[CacheSizes], reference: Reference) -> None:
    """The written file in ONNX Runtime's CPU provider, on the operator's function body.

    Raises:
        RefusedError: its logits differ, so the tracing has frozen something.
        ExportError: onnxruntime is not installed.
    """
    if reference.dtype == "bfloat16":
        return  # no kernels on the CPU; the model itself was checked in torch
    ort = import_onnxruntime()
    standalone = path.with_name(f"check-{path.name}")
    model = ir.load(path)
    add_function(model, OP_TYPE)
    ir.save(model, standalone)  # the weights stay where they are
    del model
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(standalone, options, providers=["CPUExecutionProvider"])
        logits = _run(session, sizes, reference)
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):  # its errors share no base class
            raise
        reason = str(error).strip().splitlines()[0]
        raise RefusedError(
            f"the traced graph fails in ONNX Runtime ({reason}); this model cannot be exported"
        ) from error
    finally:
        standalone.unlink()
    reference.refuse_difference(logits, "the traced graph")


def _run(session: Any, sizes: Sequence[CacheSizes], reference: Reference) -> NDArray[np.float32]:
    inputs, _ = graph_names(len(sizes))
    past = [
        np.zeros((len(_PADS), layer.kv_num_heads, 0, size), reference.dtype)
        for layer in sizes
        for size in (layer.head_size, layer.value_head_size)
    ]
    chunks = []
    for rows in reference.chunks():
        arrays = (
            reference.ids[:, rows].numpy(),
            reference.mask[:, : rows.stop].numpy(),
            reference.positions[:, rows].numpy(),
            *past,
        )
        known = {value.name for value in session.get_inputs()}
        feeds = {name: array for name, array in zip(inputs, arrays, strict=True) if name in known}
        logits, *past = session.run(None, feeds)
        chunks.append(logits.astype(np.float32))
    return np.concatenate(chunks, 1)
