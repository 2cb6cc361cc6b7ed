"""A Hugging Face model folder as an ONNX file whose every attention is the operator in dense mode.

The graph has inputs input_ids `[B, S]`, attention_mask `[B, T]`, position_ids `[B, S]` and
past_key_values.N.{key,value} `[B, G, P, D]`, outputs logits `[B, S, vocabulary]` and
present.N.{key,value}. K and V are never repeated and no mask is built. Rows of a batch are padded
on the left. A layer with a sliding window of its own carries it as its window, with no dense last
rows and no sinks: it stays what it was.

Memory: the weights once, as torch holds them (mapped from safetensors where the dtype stays), and
a copy of the largest. torch and transformers are imported only here, when a folder is read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from trianglemix.custom_ops.errors import TriangleMixError
from trianglemix.exporter.errors import ExportError, RefusedError

if TYPE_CHECKING:
    from trianglemix.exporter.torch_graph import CacheSizes, FlatModel

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
MODEL_FILE: Final = "model.onnx"
_MOVING_ROPE: Final = ("dynamic", "longrope", "su")
"""RoPE whose frequencies depend on the prompt's length: a graph would freeze one of them."""
_PROMPT: Final = 11  # tokens of the check, two pads in one of its rows
_TOLERANCE: Final = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}  # of the largest logit

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HuggingFaceOptions:
    """How to read the folder.

    `dtype` "auto" keeps the folder's. ONNX Runtime's CPU provider has no bfloat16 kernels: for
    the CPU ask for float32. `stage` hears the name of each step before it starts.
    """

    dtype: Dtype = "auto"
    stage: Callable[[str], None] = lambda name: None


def is_huggingface_folder(path: Path) -> bool:
    """Whether `path` is a folder with a model configuration of transformers."""
    return (path / "config.json").is_file()


def export_huggingface(folder: Path, work: Path, options: HuggingFaceOptions) -> Path:
    """Writes `work/model.onnx` and its external data; returns its path.

    Raises:
        ExportError: torch or transformers is missing, or the folder cannot be read.
        RefusedError: the model computes something that the operator or a graph cannot.
    """
    config = _read_config(folder)
    _refuse_configuration(config)
    _require_torch()
    from trianglemix.exporter.torch_graph import FlatModel, write_onnx

    with _quiet_transformers(), _explained(folder):
        options.stage("reading the weights")
        model = _load(folder, options.dtype)
        options.stage("checking the operator against the model")
        expected, sizes = _reference_logits(model)
        flat = FlatModel(model).eval()
        _check_logits(flat, sizes, expected)
        options.stage("tracing the graph and writing it")
        path = work / MODEL_FILE
        write_onnx(flat, sizes, path)
    return path


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{path} cannot be read ({error}); give the folder of a transformers model"
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
    for rope in _rope_types(config):
        if rope in _MOVING_ROPE:
            raise RefusedError(
                f"the model's rotary embedding is of type {rope!r}, whose frequencies depend on "
                "the prompt's length, which a graph cannot follow; choose a fixed type (for "
                "example yarn or linear) in config.json if the model allows it"
            )


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


def _require_torch() -> None:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ExportError(
            f"reading a Hugging Face folder needs torch and transformers ({error}); "
            "install them: pip install 'trianglemix[hf]'"
        ) from error
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < (4, 57):
        raise ExportError(
            f"transformers {transformers.__version__} is too old to read a Hugging Face folder; "
            "4.57 or newer is needed: pip install -U 'trianglemix[hf]'"
        )
    _logger.debug("torch %s, transformers %s", torch.__version__, transformers.__version__)


def _load(folder: Path, dtype: Dtype) -> Any:
    """The model with its own attention in plain operations, ready for `_reference_logits`."""
    import torch
    from transformers import AutoModelForCausalLM

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
            "for the CPU export with --dtype float32"
        )
    return model.eval()


def _check_inputs(model: Any) -> tuple[Any, Any, Any]:
    """Token ids, mask and positions of two rows, the second padded by two on the left."""
    import torch

    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.arange(2 * _PROMPT).reshape(2, _PROMPT) * 7 % vocabulary
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def _reference_logits(model: Any) -> tuple[Any, list[CacheSizes]]:
    """What transformers itself computes in one pass, and what its cache then looks like."""
    import torch
    from transformers import DynamicCache
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
    import torch

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


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars or warnings by the page: the caller shows the stages."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
