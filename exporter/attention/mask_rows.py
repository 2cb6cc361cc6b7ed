"""What every mask that is cut out of a graph can be asked, whatever its piece ends in."""

from __future__ import annotations

from functools import cached_property
from typing import Final

import numpy as np
import onnx_ir as ir
from trianglemix.custom_ops.arrays import Array
from trianglemix.exporter.attention.attention_probe import CallSizes, ProbeInputs, ShapesOf
from trianglemix.exporter.attention.cutout import CutError, OpenCut, cut_out, value_sizes
from trianglemix.exporter.attention.sites import MatchContext

_TWO_TOTALS: Final = (97, 194)


class CutRows:
    """The piece between boundary values and one value that says which keys a row sees."""

    def __init__(
        self, context: MatchContext, shapes_of: ShapesOf, end: ir.Value, has_past: bool
    ) -> None:
        """Raises CutError where it cannot be cut out or opened."""
        self._context = context
        self._shapes_of = shapes_of
        self.has_past = has_past
        boundary = list(shapes_of(CallSizes(1, 1, 1)))
        self._open = OpenCut(cut_out(context.graph, boundary, [end]))
        self._cut = self._open.cut
        self.numbers = self._cut.constants()

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for two sites whose masks are the same function of the same inputs."""
        shapes = self._shapes_of(CallSizes(2, 3, 5))
        roles: list[object] = []
        for value in self._cut.inputs:
            if value in shapes:
                roles.append((list(shapes).index(value), shapes[value]))
            elif value in self._cut.shape_only:
                roles.append(("shape", str(value.shape)))
            else:
                roles.append(value.name)
        return (type(self).__name__, self._open.data, *roles, self.has_past)

    @property
    def by_content(self) -> str | None:
        """The token ids, where the piece reads them."""
        ids = self._context.roles.input_ids
        return ids.name if self._cut.reads_ids(ids) else None

    @cached_property
    def grows_square(self) -> bool:
        """Whether some value of a single row's call grows with the square of the total."""
        try:
            less, more = (value_sizes(self._cut, self._feeds(CallSizes(1, 1, total - 1)))
                          for total in _TWO_TOTALS)  # fmt: skip
        except CutError:  # no such length runs
            return False
        least = _TWO_TOTALS[1] ** 2 // 2
        return any(b >= max(3 * a, least) for a, b in zip(less, more, strict=True))

    def _run(self, sizes: CallSizes, given: dict[ir.Value, Array] | None = None) -> Array:
        """The value at the piece's end; boundary values that are not given are zeros."""
        (result,) = self._open.run(self._feeds(sizes, given))
        return result

    def _feeds(
        self, sizes: CallSizes, given: dict[ir.Value, Array] | None = None
    ) -> dict[ir.Value, Array]:
        zeros = {
            value: np.zeros(shape, np.float32)
            for value, shape in self._shapes_of(sizes).items()
            if value in self._cut.inputs
        }
        return ProbeInputs(self._context).feeds(self._cut, sizes, {**zeros, **(given or {})})
