"""Which frequencies a configuration's rotary embedding has, plain and scaled.

Formulas: transformers, `modeling_rope_utils.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Frequencies = NDArray[np.float64]

_BY_LENGTH: Final = ("longrope", "su")
_DEFAULT_BASES: Final[dict[object, float]] = {"llama": 10000.0}
"""Of families whose older files do not name it."""


@dataclass(frozen=True)
class Rotary:
    """One kind of rotary embedding: angles of position 1, `[R/2]` each.

    `scaled` is what the configuration asks for (of longrope the short factors), `plain` the same
    without scaling, `long` what applies beyond `switch` tokens; `magnitude` multiplies cosines
    and sines.
    """

    kind: str
    plain: Frequencies
    scaled: Frequencies
    magnitude: float
    long: Frequencies | None = None
    switch: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing that a graph could have left out."""
        same = np.allclose(self.plain, self.scaled, rtol=1e-5)
        return self.long is None and same and abs(self.magnitude - 1) < 1e-4


def rotaries(config: Mapping[str, Any], head_size: int) -> list[Rotary]:
    """The kinds that a text model's configuration names; none where any cannot be told."""
    width = config.get("qk_rope_head_dim", head_size)
    try:
        return [_rotary(config, parameters, width) for parameters in _parameters(config)]
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return []  # a scaling, or parameters, that this version does not know


def _parameters(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rope parameters, one set for each base and scaling, in today's spelling."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        return []
    nested = [value for value in given.values() if isinstance(value, dict)]
    base = config.get("rope_theta", config.get("rotary_emb_base"))
    if not nested and not given and base is None:
        return []
    sets = [{"rope_theta": base, **one} for one in nested or [given]]
    local = config.get("rope_local_base_freq")
    if local is not None and not nested:  # Gemma 3: windowed layers have a base of their own
        sets.append({"rope_theta": local})
    return sets


def _rotary(config: Mapping[str, Any], parameters: dict[str, Any], head_size: int) -> Rotary:
    kind = str(parameters.get("rope_type", parameters.get("type", "default")))
    part = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    part = config.get("rotary_pct", 1.0) if part is None else part
    width = int(head_size * float(part))
    base = float(parameters.get("rope_theta") or _DEFAULT_BASES[config.get("model_type")])
    plain = 1.0 / base ** (np.arange(0, width, 2, dtype=np.float64) / width)
    longest = int(config["max_position_embeddings"]) if "max_position_embeddings" in config else 0
    original = parameters.get(
        "original_max_position_embeddings", config.get("original_max_position_embeddings", longest)
    )
    if kind in _BY_LENGTH:
        return _longrope(plain, parameters, int(original), longest)
    if kind == "dynamic":  # up to `longest` nothing is scaled
        return Rotary(kind, plain, plain, 1.0, switch=longest or None)
    if kind == "linear":
        return Rotary(kind, plain, plain / float(parameters["factor"]), 1.0)
    if kind == "llama3":
        return Rotary(kind, plain, _llama3(plain, parameters, int(original)), 1.0)
    if kind == "yarn":
        scaled, magnitude = _yarn(plain, parameters, (base, int(original), longest))
        return Rotary(kind, plain, scaled, magnitude)
    if kind in ("default", "mrope"):
        return Rotary(kind, plain, plain, 1.0)
    raise ValueError(kind)


def _longrope(
    plain: Frequencies, parameters: Mapping[str, Any], original: int, longest: int
) -> Rotary:
    factor = parameters.get("factor")
    factor = longest / original if factor is None else float(factor)
    magnitude = parameters.get("attention_factor")
    if magnitude is None:
        magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = (
        plain / np.asarray(parameters[f"{name}_factor"], np.float64) for name in ("short", "long")
    )
    return Rotary("longrope", plain, short, float(magnitude), long, original)


def _llama3(plain: Frequencies, parameters: Mapping[str, Any], original: int) -> Frequencies:
    factor = float(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    turns = original * plain / (2 * math.pi)  # in the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - smooth) * plain / factor + smooth * plain


def _yarn(
    plain: Frequencies, parameters: Mapping[str, Any], sizes: tuple[float, int, int]
) -> tuple[Frequencies, float]:
    base, original, longest = sizes
    factor = parameters.get("factor")
    factor = longest / original if factor is None else float(factor)
    magnitude = parameters.get("attention_factor")
    if magnitude is None:
        above = float(parameters.get("mscale") or 0)
        below = float(parameters.get("mscale_all_dim") or 0)
        both = above and below
        magnitude = _mscale(factor, above) / _mscale(factor, below) if both else _mscale(factor, 1)
    width = 2 * len(plain)

    def dimension(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = dimension(float(parameters.get("beta_fast") or 32))
    high = dimension(float(parameters.get("beta_slow") or 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = high - low or 0.001
    ramp = np.clip((np.arange(len(plain)) - low) / span, 0, 1)
    return plain / factor * ramp + plain * (1 - ramp), float(magnitude)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
