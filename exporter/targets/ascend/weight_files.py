"""Puts the weights of several graphs into files that they share: one file for each tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from trianglemix.exporter.errors import ExportError

FOLDER: Final = "weights"
_KEEP_INLINE_BYTES: Final = 1 << 16
_INLINE_BYTES: Final = 1 << 19
_PIECE: Final = 64 << 20


class WeightFiles:
    """Data files under `folder/weights`, each written once, however many graphs use it.

    Every tensor begins at offset 0 of a file of its own: parsers of CANN before 2025 multiply an
    offset by 4096, so that weights inside a shared file would be read from elsewhere.
    """

    def __init__(self, folder: Path, progress: Callable[[int, int], None]) -> None:
        self._folder, self._progress = folder, progress
        self._written: dict[int, ir.ExternalTensor] = {}
        self._sources: list[ir.TensorProtocol] = []  # kept alive: their ids are the keys
        self._digest = hashlib.sha256()
        self.total_bytes = 0
        (folder / FOLDER).mkdir()

    @property
    def sha256(self) -> str:
        """Digest of all files' contents in the order of their names."""
        return self._digest.hexdigest()

    def externalize(self, model: ir.Model) -> None:
        """Every large initializer of the model points to its file from here on."""
        todo = [
            value for value in model.graph.initializers.values() if value.const_value is not None
        ]
        for done, value in enumerate(todo):
            self._progress(done, len(todo))
            tensor = value.const_value
            assert tensor is not None
            if tensor.nbytes > _KEEP_INLINE_BYTES:
                value.const_value = self._place(tensor, value.name or "")

    def _place(self, tensor: ir.TensorProtocol, name: str) -> ir.ExternalTensor:
        if id(tensor) not in self._written:
            location = f"{FOLDER}/{len(self._written):05d}.bin"
            with (self._folder / location).open("wb") as file:
                for piece in _pieces(tensor):
                    file.write(piece)
                    self._digest.update(piece)
            self.total_bytes += tensor.nbytes
            self._sources.append(tensor)
            self._written[id(tensor)] = ir.ExternalTensor(
                location,
                None,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=name,
                base_dir=self._folder,
            )
        return self._written[id(tensor)]


def inline_small_weights(model: ir.Model) -> None:
    """Small weights are read into the model: passes compute with them."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= _INLINE_BYTES:
            value.const_value = ir.Tensor(read_array(tensor), dtype=tensor.dtype, name=value.name)


def read_array(tensor: ir.TensorProtocol) -> NDArray[Any]:
    """The whole tensor in memory."""
    content = b"".join(_pieces(tensor))
    return np.frombuffer(content, tensor.dtype.numpy()).reshape(tensor.shape.numpy())


def _pieces(tensor: ir.TensorProtocol) -> Iterator[bytes]:
    """The tensor's bytes in order. A data file is read plainly: onnx-ir refuses hard-linked ones,
    which is what exports beside their source consist of; the loader has checked where it lies.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        content = memoryview(tensor.tobytes())
        for begin in range(0, len(content), _PIECE):
            yield bytes(content[begin : begin + _PIECE])
        return
    left = tensor.nbytes
    with Path(tensor.path).open("rb") as file:
        file.seek(tensor.offset or 0)
        while left > 0:
            piece = file.read(min(_PIECE, left))
            if not piece:
                raise ExportError(f"weights of {tensor.name} end early in {tensor.path}")
            left -= len(piece)
            yield piece
