"""Ids that a model's configuration names: ends and beginnings of texts, pads, images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from trianglemix.exporter.sources.companions import Companions

_FILES: Final = ("config.json", "generation_config.json", "genai_config.json")
_ENDINGS: Final = ("_token_id", "_token_index", "_token_ids")


def special_ids(companions: Companions) -> tuple[int, ...]:
    """Of every `..._token_id` in the configuration files, ascending."""
    found = {number for name in _FILES for number in _ids(companions.settings(name))}
    return tuple(sorted(found))


def _ids(section: Mapping[str, Any]) -> Iterator[int]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _ids(value)
        elif key.endswith(_ENDINGS):
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int):
                    yield number
