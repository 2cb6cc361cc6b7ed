"""Sessions of `--verify`: the forms of source and export that are compared, opened to be run."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
from trianglemix.custom_ops.arrays import Array
from trianglemix.custom_ops.block_sparse.contract import ATTR_MASS
from trianglemix.custom_ops.contract import ATTR_WINDOW, DENSE_WINDOW
from trianglemix.custom_ops.library import LibraryNotFoundError, library_path
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.graph.attention_node import AttentionNode, LayerRole
from trianglemix.exporter.graph.fold_rotation import UnfoldRotationPass
from trianglemix.exporter.graph.ort import import_onnxruntime
from trianglemix.exporter.verify.rounding import UnroundActivationsPass
from trianglemix.manifest.manifest import Manifest

CPU: Final = "CPUExecutionProvider"
_DATA_FOLDER: Final = "session.model_external_initializers_file_folder_path"
DROPPING: Final = frozenset({LayerRole.TRIANGLE, LayerRole.BLOCK_SPARSE})
"""Roles whose layers keep less than their source."""


@dataclass(frozen=True)
class OpenModel:
    """An open session and what its inputs are called."""

    session: Any
    manifest: Manifest

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """All outputs by name; feeds that the model has no input for are left out."""
        known = {value.name for value in self.session.get_inputs()}
        names = [value.name for value in self.session.get_outputs()]
        used = {name: array for name, array in feeds.items() if name in known}
        try:
            results = self.session.run(names, used)
        except Exception as error:  # ONNX Runtime's errors share no base class of their own
            line = str(error).splitlines()[0][:300]
            raise ExportError(f"verification: the model does not run: {line}") from error
        return dict(zip(names, results, strict=True))


def find_library() -> tuple[Path | None, list[str]]:
    """The native library, or None and a note that says why."""
    try:
        return library_path(), []
    except LibraryNotFoundError as error:
        return None, [f"verify: the kernel was not compared: {error}"]


def open_model(
    path: Path,
    manifest: Manifest,
    library: Path | None,
    provider: str = CPU,
    *,
    unrounded: bool = False,
) -> OpenModel:
    """Opens a session on the provider, or the CPU's; raises ExportError where that fails.

    `unrounded`: activations are not rounded to 8 bits.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    wanted = dict.fromkeys((provider, CPU))
    available = ort.get_available_providers()
    providers = [name for name in wanted if name in available]
    given: str | bytes = str(path)
    if unrounded:
        model = ir.load(path)
        UnroundActivationsPass()(model)
        given = ir.to_proto(model).SerializeToString()  # its data stays where it is
        options.add_session_config_entry(_DATA_FOLDER, str(path.parent.resolve()))
    folding = ["ConstantFolding"] if unrounded else []  # it would make all weights floats at once
    try:
        session = ort.InferenceSession(given, options, providers, disabled_optimizers=folding)
    except Exception as error:  # ONNX Runtime's errors share no base class of their own
        line = str(error).splitlines()[0][:300]
        raise ExportError(
            f"verification: {path} does not open: {line}; where it is the source that does not, "
            "leave --verify out"
        ) from error
    return OpenModel(session, manifest)


@contextmanager
def form_of(path: Path, *, dense: Collection[LayerRole], canonical: bool) -> Iterator[Path]:
    """The export at `path`, or a copy of its graph beside the same weight files.

    `dense`: layers of these roles drop nothing; those that the source windows keep their window.
    `canonical`: as the operators' function bodies run it.
    """
    model = ir.load(path)
    nodes = AttentionNode.all_of(model.graph)
    dropping = [node for node in nodes if node.role in dense]
    folded = canonical and any(node.is_folded for node in nodes)
    if not dropping and not folded:
        yield path
        return
    for attention in dropping:
        attention.node.attributes.add(_drops_nothing(attention))
    if folded:
        UnfoldRotationPass()(model)
    copy = path.with_name("verified_form.onnx")
    try:
        ir.save(model, copy)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def _drops_nothing(attention: AttentionNode) -> ir.Attr:
    """The attribute with which a node of its role is dense."""
    if attention.role is LayerRole.BLOCK_SPARSE:
        return ir.AttrFloat32(ATTR_MASS, 1.0)
    return ir.AttrInt64(ATTR_WINDOW, DENSE_WINDOW)
