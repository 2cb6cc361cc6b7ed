"""`--verify`: the exported model beside its source, and the kernel beside the function body."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from trianglemix.custom_ops.feeds import (
    Call,
    call_feeds,
    carry,
    empty_carried,
    unfed,
    why_unfed,
)
from trianglemix.custom_ops.interface import fixed_length, fixed_past, fixed_total
from trianglemix.custom_ops.library import LibraryNotFoundError, library_path
from trianglemix.custom_ops.manifest import Manifest
from trianglemix.exporter.coarsest_type import coarsest_type
from trianglemix.exporter.cutout import import_onnxruntime
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.fold_rotation import UnfoldRotationPass
from trianglemix.exporter.registry import all_targets
from trianglemix.exporter.report import VerifyReport
from trianglemix.exporter.source_limit import source_limit
from trianglemix.exporter.target import CPU
from trianglemix.exporter.triangle_node import TriangleNode

Array = NDArray[Any]
_RELATIVE: Final = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}  # of the largest logit
_SHORT: Final = 40  # tokens, or fewer where the pattern drops earlier
_PADS: Final = 3
_BEYOND: Final = 64  # tokens of the long prompt after the first one that drops something


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


def verify_export(
    source: Path, folder: Path, manifest: Manifest, vocabulary: int, atol: float | None
) -> tuple[list[VerifyReport], list[str]]:
    """Runs source and export on random prompts; returns the comparisons and notes.

    Short prompts (a prefill and a decode step, padded on the left where the export takes that),
    of which neither drops anything, must give the source's logits; one long prompt must give the
    same with and without the native kernel. Without the library all runs on the function body, a
    model that carries none as a copy that does. `atol` is absolute; None means a share of the
    largest logit by the model's type.

    Raises:
        ExportError: a model does not open or run.
    """
    strange = unfed(manifest.inputs)
    if strange:
        raise ExportError(
            f"verification: {why_unfed(strange[0])}; leave --verify out, and compare source and "
            "export with inputs of your own"
        )
    dtype = coarsest_type(source, manifest.cache_dtype)
    checks = Checks(manifest, vocabulary, atol, dtype)
    exported = folder / manifest.model_file
    library, notes = find_library()
    if library is None:
        with _canonical(exported) as canonical:
            ours = open_model(canonical, manifest, None)
    else:
        ours = open_model(exported, manifest, library)
    theirs = open_model(source, manifest, library)
    exact = manifest.pattern.exact_length if manifest.triangle_layers else None
    limit, note = source_limit(source)
    short = min([_SHORT, *(length - 1 for length in (exact, limit) if length)])
    reports = checks.short(ours, theirs, max(short, 2))
    del theirs
    if checks.is_fixed:
        notes.append(_one_call_note(reports))
    elif library is not None and manifest.triangle_layers and exact is not None:
        with _canonical(exported) as canonical:
            fallback = open_model(canonical, manifest, None)
        reports.append(checks.long(ours, fallback, exact + _BEYOND))
    return reports, [*notes, *note]


def _one_call_note(reports: list[VerifyReport]) -> str:
    if not reports:
        return (
            "verify: nothing was compared: every call has a fixed number of tokens, of which the "
            "pattern drops some, and the source takes no pads"
        )
    return "verify: the sizes of a call are fixed: compared in one call of these sizes"


@contextmanager
def _canonical(path: Path) -> Iterator[Path]:
    """The model in the form that the function body runs: itself, or a copy beside its weights."""
    model = ir.load(path)
    if not any(node.is_folded for node in TriangleNode.all_of(model.graph)):
        yield path
        return
    UnfoldRotationPass()(model)
    copy = path.with_name("canonical.onnx")
    try:
        ir.save(model, copy)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def find_library() -> tuple[Path | None, list[str]]:
    """The native library, or None and a note that says why."""
    try:
        return library_path(), []
    except LibraryNotFoundError as error:
        return None, [f"verify: the kernel was not compared: {error}"]


def open_model(path: Path, manifest: Manifest, library: Path | None) -> OpenModel:
    """Opens a session on the target's provider; raises ExportError where that fails."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    wanted = dict.fromkeys((all_targets()[manifest.target].provider, CPU))
    available = ort.get_available_providers()
    providers = [name for name in wanted if name in available]
    try:
        session = ort.InferenceSession(str(path), options, providers)
    except Exception as error:  # ONNX Runtime's errors share no base class of their own
        line = str(error).splitlines()[0][:300]
        raise ExportError(f"verification: {path} does not open: {line}") from error
    return OpenModel(session, manifest)


@dataclass(frozen=True)
class Checks:
    """Comparisons on random prompts; `manifest` names the source's inputs and outputs.

    `dtype` is the coarsest type that the source rounds to, which says how close they must be.
    """

    manifest: Manifest
    vocabulary: int
    atol: float | None
    dtype: str

    @property
    def is_fixed(self) -> bool:
        """Whether all calls have the same number of tokens, or the cache a fixed length."""
        inputs = self.manifest.inputs
        return bool(fixed_length(inputs) or fixed_past(inputs) or fixed_total(inputs))

    def short(self, ours: OpenModel, theirs: OpenModel, tokens: int) -> list[VerifyReport]:
        """A prefill, and a decode step after it, against the source; where sizes are fixed, a call.

        A call of more tokens than `tokens` begins with pads, where it may.
        """
        rows = self.manifest.batch or 2
        size = fixed_length(self.manifest.inputs) or tokens
        lead = max(0, size - tokens)
        if lead and not self.manifest.left_padding:
            return []
        ids = self.ids(rows, size)
        mask = np.ones((rows, size), np.int64)
        mask[:, :lead] = 0
        padded = self.manifest.left_padding and size - lead > _PADS and rows > 1
        if padded:
            mask[1, : lead + _PADS] = 0
        feeds = self.feeds(ids, mask)
        name = "short prompt, one row padded" if padded else "short prompt"
        first, first_source = ours.run(feeds), theirs.run(feeds)
        reports = [self.compare(name, size - lead, first, first_source)]
        if self.manifest.has_cache and not self.is_fixed:
            mask = np.concatenate([mask, np.ones((rows, 1), np.int64)], axis=1)
            step = self.feeds(self.ids(rows, 1), mask)
            results = [
                model.run({**step, **self.carried(feeds, before)})
                for model, before in ((ours, first), (theirs, first_source))
            ]
            reports.append(self.compare("decode step", tokens + 1, *results))
        return reports

    def long(self, kernel: OpenModel, fallback: OpenModel, tokens: int) -> VerifyReport:
        """A prompt of which keys are dropped: the kernel against the function body."""
        feeds = self.feeds(self.ids(1, tokens), np.ones((1, tokens), np.int64))
        name = "long prompt, kernel against function body"
        return self.compare(name, tokens, kernel.run(feeds), fallback.run(feeds))

    def ids(self, batch: int, length: int) -> Array:
        """Random tokens `[B, length]`, the same for a length each time."""
        return np.random.default_rng(length).integers(0, self.vocabulary, (batch, length))

    def feeds(self, ids: Array, mask: Array) -> dict[str, Array]:
        """A call over an empty cache; `mask` `[B, T]` ends with the columns of `ids` `[B, S]`.

        A cache whose length is fixed holds zeros, which the mask hides.
        """
        inputs = self.manifest.inputs
        hidden = np.zeros((len(ids), fixed_past(inputs) or 0), np.int64)
        mask = np.concatenate([hidden, mask], axis=1)
        return call_feeds(inputs, Call(ids, mask)) | empty_carried(inputs, len(ids))

    def carried(self, feeds: dict[str, Array], outputs: dict[str, Array]) -> dict[str, Array]:
        """The caches and states of the next call, from one call's feeds and outputs."""
        return carry(self.manifest.inputs, feeds, outputs)

    def compare(
        self, name: str, tokens: int, ours: dict[str, Array], theirs: dict[str, Array]
    ) -> VerifyReport:
        """Logits of the last position (real in every row) of both."""
        a, b = (x[self.manifest.logits][:, -1].astype(np.float64) for x in (ours, theirs))
        error = float(np.abs(a - b).max()) if np.isfinite(a).all() else float("inf")
        relative = _RELATIVE[self.dtype] * float(np.abs(b).max())
        tolerance = relative if self.atol is None else self.atol
        return VerifyReport(name, tokens, error, tolerance, error <= tolerance)
