"""`--verify` for static graphs: the very files, run on ONNX Runtime, beside their source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from trianglemix.custom_ops.arrays import Array
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.interface.language_model_head import find_head
from trianglemix.exporter.onnx_file.model_file import MODEL_FILE, save_model
from trianglemix.exporter.report.export_report import VerifyReport
from trianglemix.exporter.sources.prepare_source import WORK_FOLDER
from trianglemix.exporter.targets._target import Finished
from trianglemix.exporter.verify.comparisons import Checks
from trianglemix.exporter.verify.graph_facts import source_limit
from trianglemix.exporter.verify.rounding import coarsest_type
from trianglemix.exporter.verify.session import OpenModel, find_library, open_model
from trianglemix.manifest.manifest import Manifest
from trianglemix.manifest.static_graphs import StaticGraphs

_BEYOND: Final = 64  # tokens of the long prompt after the first one that drops something
_STREAMED: Final = 40  # rows before the tail, where no triangle layer sets a limit


def check_can_run(manifest: Manifest) -> None:
    """Raises ExportError for a type that ONNX Runtime's CPU provider does not compute in."""
    if manifest.cache_dtype == "bfloat16":
        raise ExportError(
            "--verify runs the graphs on ONNX Runtime's CPU provider, which computes nothing in "
            "bfloat16; leave --verify out, or export a Hugging Face folder with --dtype float16"
        )


def verify_folder(
    finished: Finished, folder: Path, packaged: Manifest
) -> tuple[list[VerifyReport], list[str]]:
    """Runs source and folder (`packaged` its manifest) on random prompts; comparisons and notes.

    A prompt inside the tail, the longest one of which nothing is dropped (chunks, then the tail)
    and a decode step must give the source's logits; a prompt of which keys are dropped must give
    those of the operator's kernel.

    Raises:
        ExportError: a model does not open or run.
    """
    static = packaged.static
    assert static is not None
    library, notes = find_library()
    source, manifest = finished.source.path, finished.manifest
    head = find_head(finished.graph.roles)
    vocabulary = (head.vocabulary_size if head else None) or 2
    dtype = coarsest_type(source, manifest.cache_dtype)
    checks = Checks(manifest, vocabulary, finished.options.atol, dtype)
    ours = _StaticModel(folder, packaged, manifest.logits, static, library)
    theirs = open_model(source, manifest, library)
    limit, note = source_limit(source)
    exact = _exact_length(packaged, static, limit)
    short = min(static.tail.rows, exact)
    reports = _against_source(checks, ours, theirs, [short, exact] if exact > short else [short])
    del theirs
    long = min(max(exact, static.stream.rows + static.tail.rows) + _BEYOND, static.slots)
    if packaged.triangle_layers and long > exact and library is not None:
        reports.append(_against_kernel(finished, checks, ours, (folder, long, library)))
    return reports, [*notes, *note]


def _exact_length(manifest: Manifest, static: StaticGraphs, limit: int | None) -> int:
    """The longest prompt that must give the source's logits and leaves a slot to decode in.

    `limit` is the longest of which the source drops nothing, None where it never does.
    """
    exact = manifest.pattern.exact_length if manifest.triangle_layers else None
    wanted = exact or static.tail.rows + static.stream.rows + _STREAMED
    return max(1, min(wanted, static.slots - 1, limit or wanted))


def _against_source(
    checks: Checks, ours: _StaticModel, theirs: OpenModel, lengths: list[int]
) -> list[VerifyReport]:
    """Prompts of these lengths, and a decode step after the last of them."""
    reports = []
    feeds: dict[str, Array] = {}
    before: dict[str, Array] = {}
    for length in lengths:
        ids = checks.ids(1, length)
        feeds = checks.feeds(ids, np.ones((1, length), np.int64))
        before = theirs.run(feeds)
        name = "prompt in the tail" if length == lengths[0] else "prompt in chunks and the tail"
        got = ours.read(ids, length, is_new=True)
        reports.append(checks.compare(name, length, got, before))
    total = lengths[-1] + 1
    step = checks.feeds(checks.ids(1, 1), np.ones((1, total), np.int64))
    want = theirs.run({**step, **checks.carried(feeds, before)})
    got = ours.read(checks.ids(1, 1), lengths[-1], is_new=False)
    return [*reports, checks.compare("decode step", total, got, want)]


def _against_kernel(
    finished: Finished, checks: Checks, ours: _StaticModel, long: tuple[Path, int, Path]
) -> VerifyReport:
    """A prompt of which keys are dropped, beside the canonical graph with the native kernel."""
    folder, tokens, library = long
    path = _save_canonical(finished, folder / WORK_FOLDER / "verify")
    kernel = open_model(path, finished.manifest, library)
    ids = checks.ids(1, tokens)
    want = kernel.run(checks.feeds(ids, np.ones((1, tokens), np.int64)))
    name = "long prompt against the operator's kernel"
    return checks.compare(name, tokens, ours.read(ids, tokens, is_new=True), want)


def _save_canonical(finished: Finished, folder: Path) -> Path:
    """Beside links of the source's weights; the folder goes away with its parent."""

    def silent(done: int, total: int) -> None: ...

    folder.mkdir(parents=True)
    save_model(finished.graph.model, finished.source.path.parent, folder, "link", silent)
    return folder / MODEL_FILE


@dataclass
class _StaticModel:
    """The folder's graphs over one cache in host memory; sessions are opened when needed."""

    folder: Path
    manifest: Manifest
    logits: str  # by the source's name
    static: StaticGraphs
    library: Path | None

    def __post_init__(self) -> None:
        self._sessions: dict[str, OpenModel] = {}
        self._cache: dict[str, Array] = {}
        self._length = 0

    def read(self, ids: Array, prompt_end: int, *, is_new: bool) -> dict[str, Array]:
        """Logits, by the source's name, behind tokens `[1, S]` of a new sequence or the last."""
        manifest = self.manifest
        if is_new:
            self._length, self._cache = 0, self._empty_cache()
        begin, end = self._length, self._length + ids.shape[1]
        outputs: dict[str, Array] = {}
        tail_begin = prompt_end - manifest.pattern.num_last_tokens
        for part in self.static.parts(begin, end, tail_begin):
            rows = ids[:, part.begin - begin : part.end - begin]
            small = self.static.small_feeds(part, manifest.input_ids, rows)
            outputs = self._session(part.graph.file).run({**self._cache, **small})
            self._store(outputs, part.begin, rows.shape[1])
        self._length = end
        return {self.logits: outputs[manifest.logits]}

    def _store(self, outputs: dict[str, Array], start: int, rows: int) -> None:
        for present, past in self.manifest.past_of.items():
            self._cache[past][:, :, start : start + rows] = outputs[present][:, :, :rows]

    def _empty_cache(self) -> dict[str, Array]:
        held = set(self.manifest.past_of.values())
        return {
            tensor.name: np.zeros(tensor.shape, tensor.dtype)
            for graph in self.static.graphs
            for tensor in graph.inputs
            if tensor.name in held
        }

    def _session(self, file: str) -> OpenModel:
        if file not in self._sessions:
            path = self.folder / file
            self._sessions[file] = open_model(path, self.manifest, self.library)
        return self._sessions[file]
