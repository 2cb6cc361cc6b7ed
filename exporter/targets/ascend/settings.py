"""What the user may ask of the target ascend."""

from __future__ import annotations

from dataclasses import dataclass

from trianglemix.exporter.options import ExportOptions
from trianglemix.manifest.static_graphs import Lowering


@dataclass(frozen=True)
class AscendRequest:
    """Options of the target; tokens. `max_length` and `block` None leave it to us.

    `cost` prints the cost model's tables.
    """

    soc: str = "Ascend910B3"
    chunk: int = 1024
    max_length: int | None = None
    block: int | None = None
    lowering: Lowering = "block"
    cost: bool = False

    @classmethod
    def of(cls, options: ExportOptions) -> AscendRequest:
        """An export's own; the defaults where it was asked for nothing."""
        return options.settings if isinstance(options.settings, cls) else cls()
