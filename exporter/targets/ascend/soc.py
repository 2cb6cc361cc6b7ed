"""The Ascend chips that the linter and the cost model know, and their figures.

Derived from CANN's platform files (cores x 16^3 x 2 x clock; cores x bytes per cycle x clock), not
measured. UB is the vector cores' buffer, L1 and L0 are the matrix core's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from trianglemix.exporter.errors import ExportError

_KIB: Final = 1024


@dataclass(frozen=True)
class Soc:
    """One chip: buffers (bytes), matrix rate (FLOP/s), memory rate (B/s)."""

    name: str
    ub_bytes: int
    l1_bytes: int
    l0_bytes: int  # L0A and L0B, each
    l0c_bytes: int
    half_flops: float
    memory_bytes_per_s: float
    has_bfloat16: bool = True


def _soc(
    name: str, buffers_kib: tuple[int, int, int, int], rates: tuple[float, float],
    has_bfloat16: bool = True,
) -> Soc:  # fmt: skip
    ub, l1, l0, l0c = (size * _KIB for size in buffers_kib)
    return Soc(name, ub, l1, l0, l0c, rates[0] * 1e12, rates[1] * 1e12, has_bfloat16)


_A2: Final = (192, 512, 64, 128)
SOCS: Final = (
    _soc("Ascend910B1", _A2, (364, 1.42)),
    _soc("Ascend910B3", _A2, (295, 1.15)),
    _soc("Ascend910_9391", _A2, (364, 1.42)),
    _soc("Ascend310P3", (256, 1024, 64, 256), (69, 0.14), has_bfloat16=False),
    _soc("Ascend950PR_9599", (248, 512, 64, 256), (531, 2.0)),
)
_FAMILIES: Final = (
    ("Ascend310P", "Ascend310P3"),
    ("Ascend910B", "Ascend910B3"),
    ("Ascend910_93", "Ascend910_9391"),
    ("Ascend950", "Ascend950PR_9599"),
)


def find_soc(name: str) -> Soc:
    """The chip of that `--soc_version`; a sibling's figures for the others of its family.

    Raises:
        ExportError: no such family; the message lists what is known.
    """
    exact = {soc.name: soc for soc in SOCS}
    if name in exact:
        return exact[name]
    for prefix, sibling in _FAMILIES:
        if name.startswith(prefix):
            return Soc(**{**exact[sibling].__dict__, "name": name})
    raise ExportError(
        f"soc is {name}, but must be one of {', '.join(exact)} or a sibling of theirs "
        "(npu-smi info prints the chip's name)"
    )
