"""How many rows each triangle layer streamed, and how many it read densely, since the start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LayerCount:
    """Rows of one layer."""

    layer: int
    triangle_rows: int = 0
    dense_rows: int = 0

    def add(self, triangle_rows: int, dense_rows: int) -> None:
        """Counts one step."""
        self.triangle_rows += triangle_rows
        self.dense_rows += dense_rows
