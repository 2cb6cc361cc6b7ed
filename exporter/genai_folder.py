"""onnxruntime-genai's configuration of an exported folder: our model, our library beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final

from trianglemix.custom_ops.library import LIBRARY_NAME, LibraryNotFoundError, library_path
from trianglemix.exporter.errors import ExportError

CONFIG_NAME: Final = "genai_config.json"


def write_genai_config(
    source: Path, folder: Path, model_file: str, *, needs_library: bool
) -> list[str]:
    """Carries `genai_config.json` over, if the source folder has one; returns notes.

    The copy names `model_file` and, with `needs_library`, our operator library, which is copied
    into `folder`: genai resolves its name from there, and takes no `..` in it.

    Raises:
        ExportError: the file is not genai's configuration.
    """
    path = source / CONFIG_NAME
    if not path.is_file():
        return []
    config = _read(path)
    decoder = config["model"]["decoder"]
    if "pipeline" in decoder:
        return [
            f"{CONFIG_NAME} describes a pipeline of several models and was left out: write one "
            f"that names {model_file} and custom_ops_library {LIBRARY_NAME}"
        ]
    decoder["filename"] = model_file
    if needs_library:
        try:
            library = library_path()
        except LibraryNotFoundError as error:
            return [f"{CONFIG_NAME} was left out: {error}"]
        for file in library.parent.glob("libtrianglemix_*.so"):
            shutil.copyfile(file, folder / file.name)  # the CUDA kernels are looked for beside it
        decoder.setdefault("session_options", {})["custom_ops_library"] = LIBRARY_NAME
    text = json.dumps(config, indent=4, ensure_ascii=False)
    (folder / CONFIG_NAME).write_text(f"{text}\n", encoding="utf-8")
    return [f"{CONFIG_NAME} carried over: onnxruntime-genai opens the folder as it is"]


def _read(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = isinstance(config["model"]["decoder"], dict)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} cannot be read as genai's configuration: {error!r}") from error
    if not known:
        raise ExportError(f"{path} cannot be read as genai's configuration: no model.decoder")
    return config
