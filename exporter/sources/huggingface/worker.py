"""The torch side of `huggingface`: a process of its own that loads, checks, traces and writes.

    python -m trianglemix.exporter.sources.huggingface.worker EVENTS_FD FOLDER MODEL_PATH DTYPE

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
from typing import Any

import torch
from torch.onnx.errors import UnsupportedOperatorError
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging
from trianglemix.custom_ops.errors import TriangleMixError
from trianglemix.exporter.errors import ExportError, RefusedError
from trianglemix.exporter.sources.huggingface.compare_with_transformers import (
    check_traced_model,
    check_written_file,
    compute_reference,
)
from trianglemix.exporter.sources.huggingface.load_config import explained_loading, load_config
from trianglemix.exporter.sources.huggingface.operator_in_torch import TracedMask
from trianglemix.exporter.sources.huggingface.refusals import (
    ONNX_ROUTE,
    refuse_experts,
    refuse_moving_rope,
    refuse_other_layers,
    rope_types_of_model,
    unsupported_operator,
)
from trianglemix.exporter.sources.huggingface.trace_graph import (
    FlatModel,
    FrozenDecisionError,
    write_onnx,
)
from trianglemix.hf.weight_files import check_loaded

_logger = logging.getLogger(__spec__.name)  # __name__ is "__main__" in the worker's own process


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
        refuse_moving_rope(rope_types_of_model(model))
        refuse_other_layers(model)
        reference = compute_reference(model)
        flat = FlatModel(model).eval()
        sizes = flat.measure_caches()
        check_traced_model(flat, sizes, reference)
        stage("tracing the graph and writing it")
        try:
            write_onnx(flat, sizes, path)
        except FrozenDecisionError as error:
            refuse_experts(model, str(error).split(",")[0])
            raise
        except UnsupportedOperatorError as error:
            refused = unsupported_operator(model, error)
            if "::histc" in str(refused):
                refuse_experts(model, "aten::histc")
            raise refused from error
        flat.close()
        del flat, model  # torch's weights, before ONNX Runtime maps its own
        stage("checking the written graph")
        check_written_file(path, sizes, reference)


def _load(folder: Path, dtype: str) -> Any:
    """The model with its own attention in plain operations, ready for `compute_reference`."""
    config = load_config(folder)
    with explained_loading(folder):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused by name
        )
    for warning in check_loaded(folder, model, found):
        _logger.warning("%s", warning)
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        _logger.warning(
            "the folder brings code of its own for its model (auto_map), which is not run: "
            "transformers' %s is exported in its place",
            type(model).__name__,
        )
    if model.dtype == torch.float16:
        _refuse_overflow(model)
    if model.dtype == torch.bfloat16:
        _logger.warning(
            "the weights are bfloat16, for which ONNX Runtime's CPU provider has no kernels; "
            "for the CPU export with --target cpu, which makes them float32"
        )
    return model.eval()


def _refuse_overflow(model: Any) -> None:
    """Weights beyond 65504 are infinite in float16; nothing else may make them so either."""
    bad = [
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise RefusedError(
            f"the weight {bad[0]}{more} holds numbers beyond 65504, the largest of float16; export "
            "the model in its own type, or in float32"
        )


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Errors of torch and transformers in one line of ours; their cause stays attached."""
    try:
        yield
    except TriangleMixError:
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        OSError,
    ) as error:
        raise _as_export_error(folder, error) from error
    except (RuntimeError, TypeError, ValueError) as error:
        raise _as_export_error(folder, error) from error


def _as_export_error(folder: Path, error: Exception) -> ExportError:
    first_line = (str(error).strip().splitlines() or [""])[0]
    if TracedMask.__name__ in first_line:  # operators look a method up past __getattr__
        return RefusedError(
            "the model computes with its attention mask, so it makes a mask of its own, whose "
            "meaning is unknown; this model cannot be exported"
        )
    return ExportError(
        f"transformers or torch cannot export the model in {folder}: "
        f"{type(error).__name__}: {first_line}; {ONNX_ROUTE}"
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
