"""How the package's dataclasses are read from JSON files (`manifest.checked_json`)."""

from __future__ import annotations

from typing import Any, Final

STRICT: Final[Any] = {"strict": True, "extra": "forbid", "allow_inf_nan": False}
"""For a class's `__pydantic_config__`: no conversion between types, no unknown keys, no NaN."""
