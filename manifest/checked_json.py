"""JSON files read into dataclasses: each value of its type, no key that is not known.

A class says so with `__pydantic_config__ = STRICT`; its `__post_init__` and the types below say
which values are in range.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, TypeVar, cast

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from pydantic_core import from_json
from trianglemix.custom_ops.errors import TriangleMixError

T = TypeVar("T")

_LONGEST: Final = 60
Count = Annotated[int, Field(ge=1, lt=2**31)]
"""Heads, sizes, layers: one or more."""
Index = Annotated[int, Field(ge=0, lt=2**31)]
"""A number that counts from 0."""


class JsonFileError(TriangleMixError):
    """A file that cannot be read, or that says what it cannot mean."""


class JsonVersionError(JsonFileError):
    """A file of another format version, which `found` tells."""

    def __init__(self, found: object) -> None:
        super().__init__(f"has format version {shown(found)}")
        self.found = found


def read_checked(path: Path, kind: type[T], version: int) -> T:
    """The file's content as a `kind`; its `format_version`, which `kind` has not, is `version`.

    Raises:
        JsonVersionError: another version, or none.
        JsonFileError: unreadable, not JSON, or a value that does not fit; says which and where.
        TriangleMixError: what `kind` itself refuses.
    """
    try:
        content = from_json(path.read_bytes(), allow_inf_nan=False)
    except (OSError, ValueError) as error:
        raise JsonFileError(f"cannot be read ({error})") from error
    found = content.pop("format_version", None) if isinstance(content, dict) else None
    if type(found) is not int or found != version:
        raise JsonVersionError(found)
    try:
        result: T = _adapter(cast(Hashable, kind)).validate_json(json.dumps(content))
        return result
    except ValidationError as error:
        raise JsonFileError(_first_fault(error)) from error


def shown(value: object) -> str:
    """A value of the file for a message: short, on one line."""
    text = ascii(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _first_fault(error: ValidationError) -> str:
    faults = error.errors(include_url=False)
    first = faults[0]
    place = ".".join(str(part) for part in first["loc"]) or "the file"
    own = first["msg"].removeprefix("Value error, ")  # with its own words for the value
    reason = own if own != first["msg"] else first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] not in ("missing", "value_error"):
        place += f" is {shown(first['input'])}"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"is not understood: {place[:200]}: {reason[:300]}{more}"


@cache
def _adapter(kind: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(cast(type[Any], kind))


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if not name.isprintable() or "\\" in name or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{shown(name)} must be a file inside the folder")
    if path.name in ("", "."):
        raise ValueError(f"{shown(name)} must name a file")
    return name


def one_of(*names: str) -> Any:
    """For `Annotated[str, ...]`: one of the names."""

    def check(name: str) -> str:
        if name not in names:
            raise ValueError(f"{shown(name)} must be one of {', '.join(names)}")
        return name

    return AfterValidator(check)


FileName = Annotated[str, AfterValidator(_inside)]
"""A file's name, relative to the folder and inside it."""
