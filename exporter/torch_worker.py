"""The torch side of `huggingface`: a process of its own that loads, checks, traces and writes.

    python -m trianglemix.exporter.torch_worker EVENTS_FD FOLDER MODEL_PATH DTYPE

torch's exporter can crash natively and prints whole graphs; here neither harms the caller, and
torch's memory is gone when it ends. Events are lines of JSON: `{"stage": ...}`,
`{"warning": ...}`, `{"refused": ...}` or `{"error": ...}`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as transformers_logging
from trianglemix.custom_ops.errors import TriangleMixError
from trianglemix.exporter.errors import ExportError, RefusedError
from trianglemix.exporter.torch_graph import CacheSizes, FlatModel, write_onnx

_PROMPT: Final = 11  # tokens of the check, two pads in one of its rows
_TOLERANCE: Final = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}  # of the largest logit

_logger = logging.getLogger(__name__)


def export_model(folder: Path, path: Path, dtype: str, stage: Callable[[str], None]) -> None:
    """Writes the model of `folder` to `path`; `stage` hears each step before it starts.

    Raises:
        ExportError: transformers or torch cannot read or trace the model.
        RefusedError: the model computes something that the operator or a graph cannot.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with _explained(folder):
        stage("reading the weights")
        model = _load(folder, dtype)
        stage("checking the operator against the model")
        expected, sizes = _reference_logits(model)
        flat = FlatModel(model).eval()
        _check_logits(flat, sizes, expected)
        stage("tracing the graph and writing it")
        write_onnx(flat, sizes, path)


def _load(folder: Path, dtype: str) -> Any:
    """The model with its own attention in plain operations, ready for `_reference_logits`."""
    model, found = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if found["missing_keys"]:
        names = sorted(found["missing_keys"])
        raise ExportError(
            f"{folder} lacks {len(names)} weights of its model, {names[0]} among them; "
            "give a complete folder"
        )
    if model.dtype == torch.bfloat16:
        _logger.warning(
            "the weights are bfloat16, for which ONNX Runtime's CPU provider has no kernels; "
            "for the CPU export with --target cpu, which makes them float32"
        )
    return model.eval()


def _check_inputs(model: Any) -> tuple[Any, Any, Any]:
    """Token ids, mask and positions of two rows, the second padded by two on the left."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.arange(2 * _PROMPT).reshape(2, _PROMPT) * 7 % vocabulary
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def _reference_logits(model: Any) -> tuple[Any, list[CacheSizes]]:
    """What transformers itself computes in one pass, and what its cache then looks like."""
    import torch
    from trianglemix.exporter.torch_graph import CacheSizes

    ids, mask, positions = _check_inputs(model)
    cache = DynamicCache()
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).logits
    sizes = [
        CacheSizes(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
        for layer in cache.layers
    ]
    return logits, sizes


def _check_logits(flat: FlatModel, sizes: list[CacheSizes], expected: Any) -> None:
    """The operator, in two chunks, must give the logits that transformers gave in one pass.

    Raises:
        RefusedError: it does not, so the model holds something that was not understood.
    """
    ids, mask, positions = _check_inputs(flat.model)
    dtype = flat.model.dtype
    past = [
        torch.zeros(2, layer.kv_num_heads, 0, size, dtype=dtype)
        for layer in sizes
        for size in (layer.head_size, layer.value_head_size)
    ]
    chunks, split = [], _PROMPT - 3
    with torch.no_grad():
        for rows in (slice(0, split), slice(split, _PROMPT)):
            logits, *past = flat(ids[:, rows], mask[:, : rows.stop], positions[:, rows], past)
            chunks.append(logits)
    wrong = (torch.cat(chunks, 1).float() - expected.float()).abs().amax(-1)
    worst = float((wrong * mask).max() / expected.float().abs().max())
    name = str(dtype).removeprefix("torch.")
    _logger.info("operator against transformers: %.1e of the largest logit (%s)", worst, name)
    if not worst <= _TOLERANCE[name]:
        raise RefusedError(
            f"with the operator in its attention the model's logits are off by {worst:.1e} of the "
            f"largest (allowed {_TOLERANCE[name]:.0e}): {type(flat.model).__name__} computes "
            "something in its attention that the operator does not"
        )


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Errors of torch and transformers in one line of ours; their cause stays attached."""
    try:
        yield
    except TriangleMixError:
        raise
    except (ArithmeticError, AttributeError, ImportError, LookupError, OSError) as error:
        raise _as_export_error(folder, error) from error
    except (RuntimeError, TypeError, ValueError) as error:
        raise _as_export_error(folder, error) from error


def _as_export_error(folder: Path, error: Exception) -> ExportError:
    first_line = (str(error).strip().splitlines() or [""])[0]
    return ExportError(
        f"transformers or torch cannot export the model in {folder}: "
        f"{type(error).__name__}: {first_line}"
    )


class _EventHandler(logging.Handler):
    """Warnings of this package, for the caller to show."""

    def __init__(self, send: Callable[[str, str], None]) -> None:
        super().__init__(logging.WARNING)
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send("warning", record.getMessage())


def main(arguments: list[str]) -> int:
    """Runs one export and sends its events; returns the exit code."""
    events_fd, folder, path, dtype = arguments
    with open(int(events_fd), "w", encoding="utf-8") as events:

        def send(kind: str, text: str) -> None:
            events.write(json.dumps({kind: text}) + "\n")
            events.flush()

        logging.getLogger("trianglemix").addHandler(_EventHandler(send))
        try:
            export_model(Path(folder), Path(path), dtype, lambda name: send("stage", name))
        except TriangleMixError as error:
            send("refused" if isinstance(error, RefusedError) else "error", str(error))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
