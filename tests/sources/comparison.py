"""Runs a model and its export on the same text, whatever was done to names and outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from trianglemix.custom_ops.library import library_path

Array = NDArray[Any]
_TOLERANCE: Final = 2e-4
_CALLS: Final = (13, 5, 1)
_OWN_WORDS: Final = "Status Message: TriangleAttention: "


class Outcome(Enum):
    """What came of a mutated model."""

    REFUSED = "refused"
    SAME = "exported, same numbers"
    SOURCE_BROKEN = "exported, nothing to compare with"
    REFUSED_AT_RUN = "exported, refused by the operator when run"
    WRONG = "WRONG NUMBERS"
    CRASHED = "CRASH"


@dataclass(frozen=True)
class Feeding:
    """What each input of a model is for, in order: `ids`, `mask`, `position` or `cache`.

    Mutations neither add nor move an input, but may take its name or shape, and may take an output.
    `cache_sizes` holds heads and head size of every cache, in order, `presents` the output that
    becomes the cache of the next call, or -1 where that is gone.
    """

    roles: tuple[str, ...]
    cache_sizes: tuple[tuple[int, int], ...]
    present_values: tuple[ir.Value, ...]
    presents: tuple[int, ...]

    @classmethod
    def of(cls, model: ir.Model) -> Feeding:
        """As names, shapes and the order of caches tell."""
        roles = tuple(_role(str(value.name)) for value in model.graph.inputs)
        shapes = [value.shape for value, role in zip(model.graph.inputs, roles, strict=True)
                  if role == "cache"]  # fmt: skip
        sizes = tuple((int(shape[1]), int(shape[3])) for shape in shapes if shape)
        values = tuple(model.graph.outputs)[-len(sizes) :]
        return cls(roles, sizes, values, ()).after(model)

    def after(self, model: ir.Model) -> Feeding:
        """The same with what is left of the outputs."""
        left = {value: index for index, value in enumerate(model.graph.outputs)}
        return replace(self, presents=tuple(left.get(value, -1) for value in self.present_values))


def _role(name: str) -> str:
    return next((part for part in ("position", "ids", "mask") if part in name), "cache")


def compare_models(source: Path, exported: Path, feeding: Feeding) -> tuple[Outcome, str]:
    """Runs both on a text in three calls, one row of a batch padded, and compares all outputs."""
    try:
        theirs = _opened(source, feeding)
    except Exception as error:  # ONNX Runtime's errors share no base class of their own
        return Outcome.SOURCE_BROKEN, str(error)[:200]
    try:
        ours, trouble = _Session(exported, feeding), ""
    except Exception as error:
        ours, trouble = None, f"the export does not open: {str(error)[:200]}"
    worst, ran = 0.0, False
    for batch, pads in ((1, 0), (2, 3)):
        try:
            wanted = theirs.run(batch, pads)
        except Exception:  # this batch is not for this model
            continue
        if not all(np.isfinite(_real(array, pads)).all() for array in wanted):
            continue  # a NaN that the mask hides from attention poisons a decomposed one
        if ours is None:
            return Outcome.CRASHED, trouble
        ran = True
        if pads and ours.refuses_padding:
            continue
        try:
            got = ours.run(batch, pads)
        except Exception as error:
            outcome = Outcome.REFUSED_AT_RUN if _OWN_WORDS in str(error) else Outcome.WRONG
            return outcome, f"the source runs, the export does not: {str(error)[:300]}"
        worst = max(worst, _difference(got, wanted, pads))
    if not ran:
        return Outcome.SOURCE_BROKEN, "no call of the source runs and gives finite numbers"
    if worst > _TOLERANCE:
        return _judge(worst, source, feeding)
    return Outcome.SAME, f"{worst:.1e}"


def _judge(worst: float, source: Path, feeding: Feeding) -> tuple[Outcome, str]:
    """What a difference says about the export, and what only about the source."""
    if runs(source, feeding) and not runs(_changed(source, _show_nan), feeding):
        return Outcome.SOURCE_BROKEN, "the source computes NaNs and hides them"
    shaken = _Session(_changed(source, _shake), feeding).run(1, 0)
    own = _difference(shaken, _opened(source, feeding).run(1, 0), 0)
    detail = f"numbers differ by {worst:.1e} of the largest, by {own:.1e} when weights are shaken"
    return Outcome.SAME if worst < own else Outcome.WRONG, detail


def _opened(source: Path, feeding: Feeding) -> _Session:
    """A session of a source; ONNX Runtime refuses two nodes of one name, which mean nothing."""
    try:
        return _Session(source, feeding)
    except Exception as error:  # ONNX Runtime's errors share no base class of their own
        if "two nodes with same node name" not in str(error):
            raise
    return _Session(_changed(source, _number_nodes), feeding)


def _changed(source: Path, change: Callable[[ir.Model], None]) -> Path:
    model = ir.load(source)
    change(model)
    path = source.with_name("changed.onnx")
    ir.save(model, path)
    return path


def _shake(model: ir.Model) -> None:
    """Weights move by a millionth: a mutated model may divide by nearly nothing, and then no two
    programs agree on it.
    """
    random = np.random.default_rng(0)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype is ir.DataType.FLOAT and len(tensor.shape) == 2:
            noise = 1 + 1e-6 * random.standard_normal(tensor.shape)
            value.const_value = ir.tensor((tensor.numpy() * noise).astype(np.float32))


def _number_nodes(model: ir.Model) -> None:
    for number, node in enumerate(model.graph):
        node.name = f"node_{number}"


def _show_nan(model: ir.Model) -> None:
    """No number is a NaN: exporters put 0 for the weights of a row that sees nothing."""
    for node in model.graph:
        if node.op_type == "IsNaN":
            node.op_type = "Less"
            node.resize_inputs(2)
            node.replace_input_with(1, node.inputs[0])


def _difference(ours: list[Array], theirs: list[Array], pads: int) -> float:
    """Largest difference over what real tokens gave, as a share of the largest number."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or not np.isfinite(_real(a, pads)).all():
            return float("inf")
        error = np.abs(_real(a, pads) - _real(b, pads)).max(initial=0.0)
        worst = max(worst, float(error / max(1e-6, np.abs(_real(b, pads)).max(initial=0.0))))
    return worst


def _real(array: Array, pads: int) -> Array:
    """The array with what the last row's pads gave set to 0: axis 1 of logits, 2 of caches."""
    if not pads:
        return array
    array = array.copy()
    array[(-1, slice(0, pads)) if array.ndim == 3 else (-1, slice(None), slice(0, pads))] = 0
    return array


class _Session:
    """A session of a source or an export."""

    def __init__(self, path: Path, feeding: Feeding) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.register_custom_ops_library(str(library_path()))
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._inputs = self._session.get_inputs()
        self._feeding = feeding
        self.refuses_padding = "position" not in feeding.roles

    def run(self, batch: int, pads: int) -> list[Array]:
        """All outputs of a text in three calls, the calls' outputs one after another."""
        random = np.random.default_rng(5)
        ids = random.integers(0, 60, (batch, sum(_CALLS)))
        mask = np.ones_like(ids)
        mask[-1, :pads] = 0
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        caches: list[Array | None] = [None] * len(self._feeding.presents)
        results: list[Array] = []
        start = 0
        for size in _CALLS:
            end = start + size
            call = {"ids": ids[:, start:end], "mask": mask[:, :end]}
            call["position"] = positions[:, start:end]
            outputs = self._session.run(None, self._feeds(call, caches, batch))
            results += outputs
            caches = [outputs[index] if index >= 0 else None for index in self._feeding.presents]
            start = end
        return results

    def _feeds(
        self, call: dict[str, Array], caches: list[Array | None], batch: int
    ) -> dict[str, Array]:
        feeds, used = {}, 0
        past = call["mask"].shape[1] - call["ids"].shape[1]
        for value, role in zip(self._inputs, self._feeding.roles, strict=True):
            kind = value.type.removeprefix("tensor(").removesuffix(")")
            dtype = {"float": "float32", "bool": "bool"}.get(kind, kind)
            if role != "cache":
                array = call[role]
            else:
                heads, size = self._feeding.cache_sizes[used]
                given = caches[used]
                array = np.ones([batch, heads, past, size]) if given is None else given
                used += 1
            feeds[value.name] = array.astype(dtype)
        return feeds


def runs(source: Path, feeding: Feeding) -> bool:
    """Whether a call of the model runs and gives finite numbers."""
    try:
        outputs = _opened(source, feeding).run(1, 0)
    except Exception:  # ONNX Runtime's errors share no base class of their own
        return False
    return all(np.isfinite(output).all() for output in outputs)
