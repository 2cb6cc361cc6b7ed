"""Models and calls whose numbers must be the same with every ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from trianglemix.exporter.registry import all_patterns

from tests.exporter.exports import Session, export_to, random_ids, save_example

Array = NDArray[Any]
_PATTERNS: Final = {pattern.name: pattern for pattern in all_patterns()}
_LENGTHS: Final = (13, 5, 1)  # a prompt that drops keys, a chunk, a decode step
WINDOW: Final = 4
GQA: Final = "GroupQueryAttention"


@dataclass(frozen=True)
class Case:
    """A source and how it is exported. `opset`: of the export, when versions are too old for it.

    `same_source`: from which version on the source itself gives the export's numbers, with all its
    layers exported dense; None where that is not compared.
    """

    pattern: str
    change: Callable[[ir.Node], None] = lambda node: None
    opset: int = 0
    dense: bool = False
    layers: tuple[int, ...] | None = (0, 2)
    pads: int = 3
    same_source: tuple[int, int] | None = None


def _windowed(node: ir.Node) -> None:
    node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", WINDOW)


def _windowed25(node: ir.Node) -> None:
    node.attributes["left_window_size"] = ir.AttrInt64("left_window_size", WINDOW - 1)


def _softcapped(node: ir.Node) -> None:
    node.attributes["softcap"] = ir.AttrFloat32("softcap", 2.0)


_TWIN: Final[dict[str, Any]] = {"dense": True, "layers": None}
CASES: Final = {
    **{name: Case(name, opset=23 if name == "attention" else 0) for name in sorted(_PATTERNS)},
    "twin": Case("group_query_attention", **_TWIN, pads=0, same_source=(1, 20)),
    "twin_of_softmax": Case("softmax", **_TWIN, pads=0, same_source=(1, 20)),
    "windowed": Case("group_query_attention", _windowed, **_TWIN, pads=0, same_source=(1, 24)),
    "windowed25": Case("attention", _windowed25, opset=25, **_TWIN, same_source=(1, 32)),
    "softcap": Case("group_query_attention", _softcapped),
    "softcap_twin": Case(
        "group_query_attention", _softcapped, **_TWIN, pads=0, same_source=(1, 20)
    ),
    "softcap23": Case("attention", _softcapped, opset=23, **_TWIN, pads=0, same_source=(1, 27)),
}


def write_source(name: str, folder: Path) -> Path:
    """The source's `model.onnx` in a folder of its own."""
    case = CASES[name]
    model = _PATTERNS[case.pattern].example().model
    if case.opset:
        model.graph.opset_imports[""] = case.opset
    for node in model.graph:
        if "Attention" in node.op_type:
            case.change(node)
    return save_example(model, folder / name)


def export_case(name: str, source: Path, folder: Path) -> None:
    """`folder/NAME`, by the installed ONNX Runtime."""
    case = CASES[name]
    export_to(source, folder / name, case.layers, dense=case.dense)


def write_case(name: str, source: Path, folder: Path) -> None:
    """`folder/NAME`: the export by the installed ONNX Runtime, and its calls with their logits.

    Rows of the batch are padded on the left, one but for its last token, unless `pads` is 0.
    """
    export_case(name, source, folder)
    calls = _calls(Session.of(folder / name), CASES[name].pads)
    np.savez(folder / name / "calls.npz", allow_pickle=False, **calls)


def _calls(session: Session, pads: int) -> dict[str, Array]:
    ids = random_ids(3 if pads else 1, sum(_LENGTHS))  # GroupQueryAttention takes chunks of one
    mask = np.ones_like(ids)
    if pads:
        mask[1, :pads] = 0
        mask[2, : _LENGTHS[0] - 1] = 0
    saved: dict[str, Array] = {}
    past = session.empty_cache(len(ids))
    start = 0
    for number, length in enumerate(_LENGTHS):
        end = start + length
        outputs = session.run(ids[:, start:end], mask[:, :end], past)
        positions = np.maximum(np.cumsum(mask[:, :end], axis=1) - 1, 0)[:, start:]
        feeds = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end],
                 "position_ids": positions, **past}  # fmt: skip
        saved |= {f"{number}/in/{key}": array for key, array in feeds.items()}
        saved[f"{number}/out/logits"] = outputs["logits"]
        past = session.carried(outputs)
        start = end
    return saved
