"""`--verify`: the exported model beside its source, and the kernel beside the function body.

The *dense form* is the export with nothing dropped (window -1 in its triangle layers). It must give
the source's logits at every position, also beyond every window that was found.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.graph.attention_node import LayerRole
from trianglemix.exporter.interface.runtime_fit import strange_logits
from trianglemix.exporter.report.export_report import VerifyReport
from trianglemix.exporter.verify.block_choice_check import compare_blocks, exact_length
from trianglemix.exporter.verify.comparisons import Checks
from trianglemix.exporter.verify.graph_facts import graph_facts, source_limit
from trianglemix.exporter.verify.rounding import coarsest_type, unrounded_type
from trianglemix.exporter.verify.session import (
    DROPPING,
    OpenModel,
    find_library,
    form_of,
    open_model,
)
from trianglemix.exporter.verify.text_plan import Planner
from trianglemix.exporter.verify.text_reading import (
    OneTokenError,
    Reading,
    Text,
    compare_readings,
    read,
    read_source,
)
from trianglemix.manifest.feeds import unfed, why_unfed
from trianglemix.manifest.manifest import Manifest

_UNROUNDED: Final = (
    "verify: the source rounds activations to 8 bits, where a last bit moves logits as much as a "
    "fault would: compared beyond the first short prompt without that rounding, on both sides"
)


_BY_SCORES: Final = frozenset({LayerRole.BLOCK_SPARSE})
"""A last bit may move a block in or out, and the logits with it: `compare_blocks` looks there."""


@dataclass(frozen=True)
class Verification:
    """What is compared with what.

    `tokens` is how far; `windows` are the layers' own; `num_heads` the most of a layer;
    `provider` is ONNX Runtime's; `special_ids` are what the configuration names. `atol` is
    absolute; None means a share of the largest logit by the model's type.
    """

    source: Path
    folder: Path
    manifest: Manifest
    vocabulary: int
    num_heads: int
    tokens: int
    provider: str
    atol: float | None = None
    windows: tuple[int, ...] = ()
    special_ids: tuple[int, ...] = ()


def verify_export(given: Verification) -> tuple[list[VerifyReport], list[str]]:
    """Runs source and export on random prompts; returns the comparisons and notes.

    Without the library all runs on the function body, a model that carries none as a copy that
    does. Sessions are open one after the other.

    Raises:
        ExportError: a model does not open or run.
    """
    manifest = given.manifest
    strange = [
        *(why_unfed(value) for value in unfed(manifest.inputs)),
        *strange_logits(manifest.inputs, manifest.outputs),
    ]
    if strange:
        raise ExportError(
            f"verification: {strange[0]}; leave --verify out, and compare source and "
            "export with inputs of your own"
        )
    library, notes = find_library()
    limit, limit_notes = source_limit(given.source)
    exported = given.folder / given.manifest.model_file
    facts = graph_facts(given.source, exported)
    special = {*facts.ids, *given.special_ids}
    checks = Checks(
        given.manifest,
        given.vocabulary,
        given.atol,
        coarsest_type(given.source, given.manifest.cache_dtype),
        tuple(sorted(x for x in special if 0 <= x < given.vocabulary)),
    )
    planner = Planner(
        checks, facts, given.num_heads, given.windows, _limit(given, limit, facts.positions)
    )
    job, rounded = _Job(given, checks, planner, library), list[VerifyReport]()
    dtype = unrounded_type(given.source, given.manifest.cache_dtype)
    if dtype is not None:
        brief = job.rounded().dense_beside_source()[0]
        rounded = [replace(x, name=f"{x.name}, activations rounded") for x in brief]
        job, notes = job.without_rounding(dtype), [*notes, _UNROUNDED]
    reports, more, longest = job.dense_beside_source()
    reports, notes = [*rounded, *reports], [*notes, *more]
    if library is not None and given.manifest.triangle_layers and not checks.is_fixed:
        kernel, more = job.kernel_beside_body(longest)
        reports, notes = [*reports, *kernel], [*notes, *more]
    if library is not None and given.manifest.block_sparse_layers and not checks.is_fixed:
        blocks, more = job.blocks_beside_body(longest)
        reports, notes = [*reports, *blocks], [*notes, *more]
    return reports, [*notes, *limit_notes]


def _limit(given: Verification, *ends: int | None) -> int:
    """Tokens, decode steps with them, that are fed at most; the source runs to `ends`."""
    limits = (given.tokens, given.manifest.context_length, *ends)
    return max(2, min(limit for limit in limits if limit is not None))


@dataclass(frozen=True)
class _Job:
    """The models and the texts."""

    given: Verification
    checks: Checks
    planner: Planner
    library: Path | None
    unrounded: bool = False

    def without_rounding(self, dtype: str) -> _Job:
        """The same for forms whose activations are not rounded, which makes them `dtype`."""
        checks = replace(self.checks, dtype=dtype)
        facts = replace(self.planner.facts, dynamic_scales=False)
        planner = replace(self.planner, checks=checks, facts=facts)
        return replace(self, checks=checks, planner=planner, unrounded=True)

    def rounded(self) -> _Job:
        """The same for the files as they are: whether they run, and one short text."""
        checks = replace(self.checks, dtype="rounded")
        planner = replace(self.planner.brief(), checks=checks)
        return replace(self, checks=checks, planner=planner)

    def _open(self, path: Path, library: Path | None) -> OpenModel:
        given = self.given
        return open_model(path, given.manifest, library, given.provider, unrounded=self.unrounded)

    @property
    def _exported(self) -> Path:
        return self.given.folder / self.given.manifest.model_file

    def dense_beside_source(self) -> tuple[list[VerifyReport], list[str], int | None]:
        """Reports, notes, and how far the source runs if that is less than it was given."""
        theirs = self._open(self.given.source, self.library)
        planner = self.planner.with_chunks() if self._reads_on(theirs) else self.planner
        readings, notes, longest = [], planner.notes(), None
        for choices in planner.texts():
            reading, more = self._first_that_runs(theirs, choices)
            readings.append(reading)
            notes += [note for note in more if note not in notes]
            if reading.trouble is not None:
                longest = min(reading.text.total, longest or reading.text.total)
        del theirs
        if longest is not None:
            why = next(x.trouble for x in readings if x.trouble)
            notes.append(f"verify: the source itself runs up to {longest} tokens ({_cause(why)})")
        canonical = self.library is None
        reports = []
        with form_of(self._exported, dense=DROPPING, canonical=canonical) as path:
            ours = self._open(path, self.library)
            for reading in readings:
                got = read(ours, self.checks, reading.text)
                reports += compare_readings(self.checks, got, reading)
        notes.insert(0, self._what_was_compared(readings))
        return reports, notes, longest

    def _reads_on(self, theirs: OpenModel) -> bool:
        """Whether the source gives the same logits in chunks, where that depends on a kernel."""
        texts = self.planner.same_twice()
        if texts is None:
            return False
        try:
            whole, chunks = (read(theirs, self.checks, text).logits for text in texts)
        except ExportError:
            return False
        joined = np.concatenate(chunks, axis=1)
        rows = min(joined.shape[1], 1 if whole[0].shape[1] == 1 else joined.shape[1])
        pair = joined[:, -rows:], whole[0][:, -rows:]
        return self.checks.judge("", texts[0].total, [pair]).passed

    def _what_was_compared(self, readings: list[Reading]) -> str:
        manifest = self.given.manifest
        drops = manifest.triangle_layers or manifest.block_sparse_layers
        what = "the export with nothing dropped" if drops else "the export"
        rows = "the last position of each call" if manifest.last_token_logits else "all positions"
        far = max(reading.text.total for reading in readings)
        return (
            f"verify: {what} was compared with the source at {rows} of up to {far} tokens, random "
            f"ids with special ones among them{self._columns(readings)}"
        )

    def _columns(self, readings: list[Reading]) -> str:
        """Which part of the vocabulary was compared, as the end of a sentence."""
        strides = {reading.text.total: reading.stride for reading in readings}
        parts = [
            f"every {_ordinal(stride)} logit at {total} tokens"
            for total, stride in strides.items()
            if stride > 1
        ]
        return (
            f"; of the vocabulary's {self.checks.vocabulary}, {', '.join(parts)}" if parts else ""
        )

    def _first_that_runs(self, model: OpenModel, choices: list[Text]) -> tuple[Reading, list[str]]:
        """Of ways of reading a text, the first that the source runs whole, else the longest."""
        best: Reading | None = None
        notes: list[str] = []
        error: ExportError | None = None
        for text in choices:
            try:
                reading = read_source(model, self.checks, text)
            except OneTokenError:
                notes.append("verify: the source takes one token at a time after a past")
                continue
            except ExportError as caught:
                error = caught
                continue
            if reading.trouble is None:
                return reading, notes
            if best is None or reading.text.total > best.text.total:
                best = reading
        if best is None:
            raise ExportError(
                f"verification: the source itself does not run: {_cause(str(error))}; leave "
                "--verify out"
            )
        return best, notes

    def kernel_beside_body(self, longest: int | None) -> tuple[list[VerifyReport], list[str]]:
        """A prompt of which keys are dropped, with the native kernel and without it."""
        text, notes = self.planner.dropping(longest)
        if text is None:
            return [], notes
        readings = []
        for canonical in (False, True):
            with form_of(self._exported, dense=_BY_SCORES, canonical=canonical) as path:
                library = None if canonical else self.library
                model = self._open(path, library)
                readings.append(read(model, self.checks, text))
                del model  # before the next one opens
        part = self._columns(readings)
        notes += [f"verify: kernel and function body were compared{part}"] if part else []
        return compare_readings(self.checks, *readings), notes

    def blocks_beside_body(self, longest: int | None) -> tuple[list[VerifyReport], list[str]]:
        """A prompt in which block-sparse layers choose, their kernel and what they should do."""
        exact = exact_length(self._exported)
        text, notes = self.planner.sparse(exact, longest) if exact else (None, [])
        if text is None:
            return [], notes

        def with_library(path: Path) -> OpenModel:
            return self._open(path, self.library)

        return compare_blocks(with_library, self._exported, self.checks, text), notes


def _ordinal(number: int) -> str:
    teens = number % 100 in (11, 12, 13)
    return f"{number}{'th' if teens else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


def _cause(text: str) -> str:
    return text.removeprefix("verification: ").removeprefix("the model does not run: ")[:200]
