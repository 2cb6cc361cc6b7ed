"""An exported folder on disk: its manifest, its model file and the tokens that end a generation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trianglemix.manifest.manifest import Manifest
from trianglemix.runtime.errors import FolderError


@dataclass(frozen=True)
class ModelFolder:
    """What `trianglemix-export` wrote. Without `stop_ids` only the length ends a text."""

    path: Path
    manifest: Manifest
    stop_ids: frozenset[int]

    @property
    def model_path(self) -> Path:
        """The model file that the manifest names."""
        return self.path / self.manifest.model_file

    @classmethod
    def load(cls, path: Path) -> ModelFolder:
        """Reads the folder's description; the model itself stays on disk.

        Raises:
            ManifestError: no manifest, or one of another version.
            FolderError: the model file is missing, or a settings file is not JSON.
        """
        folder = cls(path, Manifest.load(path), _stop_ids(path))
        if not folder.model_path.is_file():
            raise FolderError(
                f"{folder.model_path} is missing, although the manifest names it; export again"
            )
        return folder


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object from `path`; an empty one where there is no such file.

    Raises:
        FolderError: the file is there, but holds no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FolderError(f"{path} cannot be read ({error}); repair or remove it") from error
    if not isinstance(content, dict):
        raise FolderError(f"{path} holds no JSON object; repair or remove it")
    return content


def _stop_ids(path: Path) -> frozenset[int]:
    """Tokens of the first of the files that names any, in transformers' order; genai's last."""
    config = read_settings(path / "config.json")
    sections = (
        read_settings(path / "generation_config.json"),
        config,
        config.get("text_config"),
        read_settings(path / "genai_config.json").get("model"),
    )
    for section in sections:
        found = section.get("eos_token_id") if isinstance(section, dict) else None
        entries = found if isinstance(found, list) else [found]
        ids = [x for x in entries if isinstance(x, int) and not isinstance(x, bool)]
        if ids:
            return frozenset(ids)
    return frozenset()
