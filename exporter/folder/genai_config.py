"""onnxruntime-genai's configuration of an exported folder: our model, our library beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path, PurePosixPath
from typing import Any, Final

from trianglemix.custom_ops.library import LIBRARY_NAME, LibraryNotFoundError, library_path
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.onnx_file.file_copy import place_file
from trianglemix.exporter.sources.companions import Companions

CONFIG_NAME: Final = "genai_config.json"
_GENERATION: Final = "generation_config.json"
_LIBRARY_KEY: Final = "custom_ops_library"


def write_genai_config(
    companions: Companions, folder: Path, model_file: str, *, needs_library: bool
) -> list[str]:
    """Carries `genai_config.json` over, if the source has one; returns notes.

    The copy names `model_file` and, with `needs_library`, our operator library, which is copied
    into `folder`: genai resolves its name from there, and takes no `..` in it. It takes one
    library: where the source names its own, that stays.

    Raises:
        ExportError: the file is not genai's configuration.
    """
    path = companions.find(CONFIG_NAME)
    if path is None:
        return []
    config = _read(path)
    decoder = config["model"]["decoder"]
    if "pipeline" in decoder:
        return [
            f"{CONFIG_NAME} describes a pipeline of several models and was left out: write one "
            f"that names {model_file} and {_LIBRARY_KEY} {LIBRARY_NAME}",
        ]
    decoder["filename"] = model_file
    try:
        notes = _add_library(decoder, path.parent, folder, needs_library=needs_library)
    except LibraryNotFoundError as error:
        return [f"{CONFIG_NAME} was left out: {error}"]
    if decoder.pop("sliding_window", None) is not None:
        notes.append(
            f"{CONFIG_NAME}: decoder.sliding_window was left out, by which genai cuts the caches "
            "of windowed layers; the export's operators keep whole ones"
        )
    text = json.dumps(config, indent=4, ensure_ascii=False)
    (folder / CONFIG_NAME).write_text(f"{text}\n", encoding="utf-8")
    return [*notes, f"{CONFIG_NAME} carried over: onnxruntime-genai opens the folder as it is"]


def write_stop_tokens(companions: Companions, folder: Path) -> list[str]:
    """Writes `generation_config.json` where only genai's file says which tokens end a text.

    So they are known wherever that file itself cannot be carried over. Returns notes.
    """
    model = companions.settings(CONFIG_NAME).get("model")
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = (
        {name: model[name] for name in names if name in model} if isinstance(model, dict) else {}
    )
    if "eos_token_id" not in tokens or companions.find(_GENERATION) is not None:
        return []
    if companions.settings("config.json").get("eos_token_id") is not None:
        return []
    text = json.dumps(tokens, indent=2)
    (folder / _GENERATION).write_text(f"{text}\n", encoding="utf-8")
    return [f"{_GENERATION} written: end-of-sequence tokens as {CONFIG_NAME} names them"]


def _add_library(
    decoder: dict[str, Any], source: Path, folder: Path, *, needs_library: bool
) -> list[str]:
    """Names our library, unless the source names one; copies what is named, and ours."""
    if needs_library:
        library = library_path()
        for file in library.parent.glob("libtrianglemix_*.so"):
            shutil.copyfile(file, folder / file.name)  # the CUDA kernels are looked for beside it
    options = decoder.setdefault("session_options", {})
    theirs = options.get(_LIBRARY_KEY)
    if not isinstance(theirs, str) or not theirs or PurePosixPath(theirs).name == LIBRARY_NAME:
        if needs_library:
            options[_LIBRARY_KEY] = LIBRARY_NAME
        return []
    notes = []
    path = PurePosixPath(theirs)
    inside = not path.is_absolute() and ".." not in path.parts
    if inside and (source / path).is_file():
        if not (folder / path).exists():
            place_file(source / path, folder / path, link=False, progress=lambda part: None)
    else:
        notes.append(
            f"{CONFIG_NAME} names the operator library {theirs}, which is not copied: put it "
            "where genai looks for it"
        )
    if needs_library:
        notes.append(
            f"{CONFIG_NAME} names the operator library {theirs}, which stays, since genai takes "
            "one: there our operators run as their function bodies, right but slow. If no node "
            f"needs {theirs}, set {_LIBRARY_KEY} to {LIBRARY_NAME}, which lies beside it"
        )
    return notes


def _read(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = isinstance(config["model"]["decoder"], dict)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} cannot be read as genai's configuration: {error!r}") from error
    if not known:
        raise ExportError(f"{path} cannot be read as genai's configuration: no model.decoder")
    return config
