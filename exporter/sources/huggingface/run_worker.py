"""A Hugging Face model folder as an ONNX file whose every attention is the operator in dense mode.

The graph has inputs input_ids `[B, S]`, attention_mask `[B, T]`, position_ids `[B, S]` and
past_key_values.N.{key,value} `[B, G, P, D]`, outputs logits `[B, S, vocabulary]` and
present.N.{key,value}. K and V are never repeated and no mask is built. Rows of a batch are padded
on the left. A layer with a sliding window of its own carries it as its window, with no dense last
rows and no sinks: it stays what it was.

Memory: the weights once, as torch holds them, and a copy of the largest, in a process of its own.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Final, Literal

from trianglemix.exporter.errors import ExportError, RefusedError
from trianglemix.exporter.sources.huggingface.refusals import refuse_moving_rope
from trianglemix.hf.weight_files import check_weight_files, is_pointer

WeightsDtype = Literal["auto", "float32", "float16", "bfloat16"]
MODEL_FILE: Final = "model.onnx"
_OLDEST_TRANSFORMERS: Final = (4, 57)
_WORKER: Final = "trianglemix.exporter.sources.huggingface.worker"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HuggingFaceOptions:
    """How to read the folder.

    `dtype` "auto" keeps the folder's. ONNX Runtime's CPU provider has no bfloat16 kernels: for
    the CPU ask for float32. `stage` hears the name of each step before it starts, `warn` what the
    user shall know. Without `own_process` torch runs in this one, for many small models in a row,
    and warnings go to the log.
    """

    dtype: WeightsDtype = "auto"
    stage: Callable[[str], None] = lambda name: None
    warn: Callable[[str], None] = _logger.warning
    own_process: bool = True


def export_huggingface(folder: Path, work: Path, options: HuggingFaceOptions) -> Path:
    """Writes `work/model.onnx` and its external data; returns its path.

    Raises:
        ExportError: torch or transformers is missing, or the folder cannot be read.
        RefusedError: the model computes something that the operator or a graph cannot.
        WeightsError: the weights are not whole, or not those of the configuration.
    """
    config = _read_config(folder)
    _refuse_configuration(config)
    check_weight_files(folder)
    _require_packages()
    work.mkdir(parents=True, exist_ok=True)
    path = work / MODEL_FILE
    if options.own_process:
        _run_worker(folder, path, options)
    else:
        from trianglemix.exporter.sources.huggingface.worker import export_model

        export_model(folder, path, options.dtype, options.stage)
    return path


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "a Git LFS pointer" if path.is_file() and is_pointer(path) else error
        raise ExportError(
            f"{path} cannot be read ({reason}); give the folder of a transformers model"
        ) from error
    if not isinstance(config, dict):
        raise ExportError(f"{path} is not a configuration; give the folder of a transformers model")
    return config


def _refuse_configuration(config: dict[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise RefusedError(
            f"the folder's weights are quantized ({method}); export the unquantized model"
        )
    refuse_moving_rope(_rope_types(config))


def _rope_types(config: Any) -> Iterator[str]:
    """Values of `rope_type` (and the older `type` of `rope_scaling`), however deep."""
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if key in ("rope_scaling", "rope_parameters") and isinstance(value, dict):
            yield str(value.get("rope_type", value.get("type", "default")))
        if key == "rope_type" and isinstance(value, str):
            yield value
        yield from _rope_types(value)


def _require_packages() -> None:
    """Without importing them: that takes seconds, and only the worker needs it."""
    install = "pip install -U 'trianglemix[hf]'"
    versions = {}
    for name in ("torch", "transformers", "onnxscript"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError as error:
            raise ExportError(
                f"reading a Hugging Face folder needs {name}, which is not installed: {install}"
            ) from error
    found = versions["transformers"]
    if tuple(int(part) for part in found.split(".")[:2]) < _OLDEST_TRANSFORMERS:
        raise ExportError(
            f"transformers {found} is too old to read a Hugging Face folder; 4.57 or newer is "
            f"needed: {install}"
        )


def _run_worker(folder: Path, path: Path, options: HuggingFaceOptions) -> None:
    """Runs the torch side in its own process; its words reach us as events, its noise does not."""
    read_end, write_end = os.pipe()
    command = [sys.executable, "-P", "-m", _WORKER]
    command += [str(write_end), str(folder.resolve()), str(path.resolve()), options.dtype]
    with tempfile.TemporaryFile() as noise:
        process = subprocess.Popen(
            command, pass_fds=(write_end,), stdout=subprocess.DEVNULL, stderr=noise
        )
        os.close(write_end)
        try:
            with open(read_end, encoding="utf-8") as events:
                stage = _follow(events, options)
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        if code:
            raise ExportError(_last_words(folder, code, stage, noise))


def _follow(events: IO[str], options: HuggingFaceOptions) -> str:
    """Passes the worker's events on until it ends; returns the stage that it reached."""
    stage = "starting"
    for line in events:
        event = json.loads(line)
        if "refused" in event:
            raise RefusedError(event["refused"])
        if "error" in event:
            raise ExportError(event["error"])
        if "warning" in event:
            options.warn(event["warning"])
        if "stage" in event:
            stage = event["stage"]
            options.stage(stage)
    return stage


def _last_words(folder: Path, code: int, stage: str, noise: IO[bytes]) -> str:
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    noise.seek(0)
    lines = noise.read().decode("utf-8", "replace").strip().splitlines()
    words = f": {lines[-1][:200]}" if lines and code > 0 else ""
    return f"torch died by {how}{hint} while {stage} for {folder}{words}; try another torch version"
