"""Finds the model that the user means: an ONNX file, a folder with one, a Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.onnx_file.model_file import MODEL_FILE
from trianglemix.exporter.sources.companions import Companions

_WEIGHTS: Final = ("*.safetensors", "pytorch_model*.bin", "*.gguf")
_PLACES: Final = (".", "onnx", "*", "*/*")
"""Where a folder may keep its ONNX files: the first of them that holds any counts."""
_MOST_NAMES: Final = 12


@dataclass(frozen=True)
class Source:
    """Where the model comes from; `notes` say what was chosen, where there was a choice, and
    `warnings` what a Hugging Face folder lacks or leaves over."""

    path: Path
    companions: Companions
    is_huggingface: bool
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def find_source(path: Path) -> Source:
    """An ONNX file, the one ONNX model of a folder, or a Hugging Face folder.

    Raises:
        ExportError: nothing there, or more than one model to choose from.
    """
    if path.is_file():
        return Source(path, Companions.beside(path), is_huggingface=False)
    if not path.is_dir():
        raise ExportError(f"{path} does not exist; give a model.onnx or a model folder")
    config = (path / "config.json").is_file()
    weights = config and any(any(path.glob(pattern)) for pattern in _WEIGHTS)
    for place in _PLACES[:2] if weights else _PLACES:
        models = sorted(path.glob(f"{place}/*.onnx"))
        if models:
            return _in_folder(path, models)
    if config:
        return Source(path, Companions((path,)), is_huggingface=True)
    raise ExportError(
        f"{path} holds neither an ONNX model nor a Hugging Face config.json; give one of them"
    )


def _in_folder(folder: Path, models: list[Path]) -> Source:
    """The only model, or the only one named as models are, or as genai's configuration has it."""
    named = [model for model in models if model.name == MODEL_FILE]
    named = named or [model for model in models if model.name == _genai_decoder(model.parent)]
    candidates = models if len(models) == 1 else named
    names = [str(model.relative_to(folder)) for model in models]
    if len(candidates) != 1:
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        raise ExportError(
            f"{folder} holds several ONNX models ({', '.join(names[:_MOST_NAMES])}{more}); "
            f"name one of them, as in {folder / names[0]}"
        )
    chosen = candidates[0]
    others = [name for name, model in zip(names, models, strict=True) if model != chosen]
    note = f"the folder's {chosen.relative_to(folder)} was taken"
    note += f", not {', '.join(others[:_MOST_NAMES])}: name another to have it" if others else ""
    companions = Companions.beside(chosen)
    if chosen.parent != folder:
        companions = Companions((chosen.parent, folder))
    return Source(chosen, companions, is_huggingface=False, notes=(note,) if others else ())


def _genai_decoder(folder: Path) -> str | None:
    """The file that the folder's `genai_config.json` names as its decoder."""
    section: object = Companions((folder,)).settings("genai_config.json")
    for key in ("model", "decoder", "filename"):
        section = section.get(key) if isinstance(section, dict) else None
    return section if isinstance(section, str) else None
