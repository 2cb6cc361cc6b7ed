"""The files that belong to a model beside its graph: configuration, tokenizer, chat templates."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from trianglemix.exporter.onnx_file.file_copy import place_file
from trianglemix.hf.weight_files import read_object

_PATTERNS: Final = (
    "config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer*", "chat_template*", "additional_chat_templates/*.jinja", "vocab.json", "vocab.txt",
    "merges.txt", "*.model", "tekken.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
_TEMPLATES: Final = ("chat_template", "additional_chat_templates")
_SAYS_A_MODEL: Final = ("config.json", "genai_config.json", "tokenizer.json")
_GRAPH_FOLDER: Final = re.compile(r"onnx|.*[-_.]onnx|onnx[-_.].*", re.IGNORECASE)


@dataclass(frozen=True)
class Companions:
    """The model's own folder, and the one above where that is the same model's.

    Of two files of one name the first folder's counts.
    """

    folders: tuple[Path, ...]

    @classmethod
    def beside(cls, model: Path) -> Companions:
        """Those of a model file that was named: as hubs lay them out, one folder up as well.

        The folder above counts where the file lies in a folder that is named for ONNX, or has no
        config.json beside it, and where what lies there is a model's; never a home folder.
        """
        own = Path(os.path.abspath(model.parent))  # links stay: a hub's cache is made of them
        above = own.parent
        if _is_shared_place(above):
            return cls((own,))
        if _GRAPH_FOLDER.fullmatch(own.name):
            related = any((above / name).is_file() for name in _SAYS_A_MODEL)
        else:
            related = not (own / "config.json").is_file() and _describes_a_model(above)
        return cls((own, above) if related else (own,))

    @property
    def above(self) -> Path | None:
        """The second folder, if there is one."""
        return self.folders[1] if len(self.folders) > 1 else None

    def without_above(self) -> Companions:
        """Those of the model's own folder."""
        return Companions(self.folders[:1])

    def find(self, name: str) -> Path | None:
        """The file of that name that counts."""
        paths = (folder / name for folder in self.folders)
        return next((path for path in paths if path.is_file()), None)

    def settings(self, name: str) -> dict[str, Any]:
        """The JSON object in the file of that name; an empty one where there is none to read."""
        path = self.find(name)
        return {} if path is None else read_object(path)

    def copy(self, folder: Path) -> list[str]:
        """Copies all of them into `folder`, where nothing is replaced; returns notes."""
        notes, told = [], False
        for number, source in enumerate(self.folders):
            copied = [name for name in _names(source) if not (told and name.startswith(_TEMPLATES))]
            copied = [name for name in copied if not (folder / name).exists()]
            for name in copied:
                place_file(source / name, folder / name, link=False, progress=lambda part: None)
            told = told or _has_chat_template(source)
            if copied:
                where = f" from {source}, one folder up" if number else ""
                notes.append(f"copied along{where}: {', '.join(copied)}")
        return notes or ["no config or tokenizer to copy along"]


def _names(folder: Path) -> Iterator[str]:
    for pattern in _PATTERNS:
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                yield str(path.relative_to(folder))


def _has_chat_template(folder: Path) -> bool:
    """Whether one may be spoilt by template files from elsewhere, which would come first."""
    settings = read_object(folder / "tokenizer_config.json")
    return "chat_template" in settings or any(
        name.startswith(_TEMPLATES) for name in _names(folder)
    )


def _describes_a_model(folder: Path) -> bool:
    config = read_object(folder / "config.json")
    return "model_type" in config or "architectures" in config


def _is_shared_place(folder: Path) -> bool:
    """Folders in which files of any origin lie."""
    home = Path.home()
    return folder in (home, *home.parents, Path(tempfile.gettempdir()))
