"""A GGUF file as a Hugging Face folder: config, tokenizer, generation settings, float32 weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from source_models.model_cache import cached_folder, copy_companions

if TYPE_CHECKING:
    from source_models.plain_onnx import Attention, Route


@dataclass(frozen=True)
class GgufModel:
    """A model of a GGUF file and what is made of it, once for each set of package versions.

    `cache` keeps what is made, `weights_file` finds the GGUF file, `plain` says how it is exported
    (`PlainExport`).
    """

    cache: Path
    packages: Sequence[str]
    weights_file: Callable[[], Path]
    plain: tuple[Route, Attention, int]

    def hugging_face_folder(self) -> Path:
        """Folder with config, tokenizer, generation settings and float32 safetensors."""

        def make(target: Path) -> None:
            save_gguf_folder(self.weights_file(), target)

        return cached_folder(self.cache, "folder", self.packages, make)

    def plain_onnx(self) -> Path:
        """`model.onnx` (float32, KV cache, decomposed attention), tokenizer beside it."""
        from source_models.plain_onnx import PlainExport, export_plain

        source, packages = self.hugging_face_folder(), (*self.packages, "onnx-ir")

        def make(target: Path) -> None:
            export_plain(source, target / "model.onnx", PlainExport(*self.plain))
            copy_companions(source, target)

        return cached_folder(self.cache, "plain-onnx", packages, make) / "model.onnx"


def save_gguf_folder(path: Path, target: Path) -> None:
    """Writes the folder `target` from the GGUF file `path`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source: dict[str, Any] = {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=torch.float32, **source, **_dequantize()
    )
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _dequantize() -> dict[str, Any]:
    """transformers 5 must be asked for plain weights, else saving raises; 4.57 knows no other."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
