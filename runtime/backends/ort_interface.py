"""Whether a model file has the inputs and outputs that its manifest says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import onnxruntime as ort
from trianglemix.manifest.interface import GraphInput, GraphOutput, Shape
from trianglemix.manifest.manifest import Manifest
from trianglemix.runtime.errors import FolderError
from trianglemix.runtime.model_folder import ModelFolder

_TYPES: Final = {"float32": "float", "float64": "double"}  # others have one name


def check_interface(session: ort.InferenceSession, folder: ModelFolder) -> None:
    """Raises FolderError where the two are not of one export, or one was edited."""
    for difference in _differences(session, folder.manifest):
        raise FolderError(
            f"{folder.model_path} is not the model of its manifest: {difference}; export again"
        )


def _differences(session: ort.InferenceSession, manifest: Manifest) -> Iterator[str]:
    sides: tuple[tuple[str, list[Any], tuple[GraphInput | GraphOutput, ...]], ...] = (
        ("input", _inputs(session), manifest.inputs),
        ("output", session.get_outputs(), manifest.outputs),
    )
    for side, nodes, values in sides:
        found = {node.name: node for node in nodes}
        for value in values if manifest.inputs else ():
            node = found.pop(value.name, None)
            if node is None:
                if not (isinstance(value, GraphInput) and value.role == "optional"):
                    yield f"it has no {side} {value.name}"
                continue
            kind = f"tensor({_TYPES.get(value.dtype, value.dtype)})"
            if node.type != kind:
                yield f"its {side} {value.name} is {node.type}, not {kind}"
            if not _agree(value.shape, node.shape):
                yield f"its {side} {value.name} is {node.shape}, not {list(value.shape or ())}"
        needed = {node.name for node in session.get_inputs()} & found.keys()
        if side == "input" and manifest.inputs and needed:
            yield f"it has an input {min(needed)} that the manifest has not"


def _inputs(session: ort.InferenceSession) -> list[Any]:
    """Those with a default too."""
    return [*session.get_inputs(), *session.get_overridable_initializers()]


def _agree(declared: Shape | None, found: list[Any]) -> bool:
    """Whether fixed sizes are the same; a file may leave open what the other fixes."""
    if declared is None or not found:
        return True
    return len(declared) == len(found) and all(
        one == other
        for one, other in zip(declared, found, strict=True)
        if isinstance(one, int) and isinstance(other, int)
    )
