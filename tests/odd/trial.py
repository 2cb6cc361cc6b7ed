"""One odd model through the product: exported and compared with its own source, or refused."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from trianglemix.custom_ops.errors import TriangleMixError
from trianglemix.exporter.options import BlockRequest, ExportOptions, LayerRequest, PatternRequest
from trianglemix.exporter.pipeline import export
from trianglemix.manifest.feeds import unfed
from trianglemix.manifest.manifest import Manifest
from trianglemix.runtime import TriangleSession
from trianglemix.runtime.errors import ExecutionError

from tests.exporter.exports import rename_all
from tests.odd.calls import Call, Running, calls_of, difference, make_feeds
from tests.odd.decoder import Triangle, write_model
from tests.odd.odd_model import VOCABULARY, OddModel, draw_model
from tests.sources.cell import SilentObserver

_KEEP_ALL: Final = PatternRequest(sink=0, window=1 << 20, last=1)
_SMALL_SIZES: Final = (2, 6, 3)  # sink, window, last
_SMALL: Final = PatternRequest(*_SMALL_SIZES)
_CUT_PROMPT: Final = 40
_NEW_TOKENS: Final = 4


class Outcome(Enum):
    """What came of an odd model."""

    RIGHT = "exported and right"
    NOT_RUN = "exported and right, and said to be none for our runtime"
    REFUSED = "refused"
    CAUGHT = "wrong without a word, caught by --verify alone"
    WRONG = "SILENTLY WRONG"
    FALSE_ALARM = "right, but --verify fails"
    CRASHED = "CRASH"
    NO_SOURCE = "the source does not run"


@dataclass(frozen=True)
class Trial:
    """A model and its outcome; `detail` is the refusal, the error, or the largest difference."""

    model: OddModel
    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class Depth:
    """How much is tried beside the comparison of the plain export."""

    verify: bool = False
    run: bool = False
    cut: bool = False
    again: bool = False  # the export, its values renamed, is exported once more
    last: bool = False  # with --last-token-logits
    sparse: bool = False  # other layers block-sparse, with mass 1

    @classmethod
    def of(cls, seed: int) -> Depth:
        """By turns: a fourth of the seeds each, and half are cut.

        What is verified has block-sparse layers that choose, where layers are left for it.
        """
        turn = seed % 4
        return cls(turn == 0, turn == 1, seed % 8 >= 4, turn == 2, turn == 3, turn in (1, 3))


def run_trial(seed: int, depth: Depth | None = None) -> Trial:
    """Writes the model of a seed, exports it and compares."""
    model = draw_model(seed)
    with tempfile.TemporaryDirectory(prefix="odd-") as place:
        return _Bench(model, Path(place), depth or Depth.of(seed)).trial()


def store(model: onnx.ModelProto, path: Path, storage: str) -> None:
    """Weights inside the file, in one beside it, or each in one of its own."""
    if storage == "inside":
        onnx.save(model, path)
        return
    one = storage == "one_file"
    onnx.save_model(
        model,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=one,
        location="weights.data" if one else None,
        size_threshold=512,
    )


class _Bench:
    """The files of one trial."""

    def __init__(self, model: OddModel, folder: Path, depth: Depth) -> None:
        self._model = model
        self._folder = folder
        self._depth = depth

    def trial(self) -> Trial:
        source = self._write("source", None)
        try:
            running = Running(source, self._model)
            running.logits(Call(6), 0)
        except Exception as error:  # ONNX Runtime's errors share no base class of their own
            return self._ended(Outcome.NO_SOURCE, str(error))
        try:
            self._export("plain", _KEEP_ALL)
        except TriangleMixError as error:
            return self._ended(Outcome.REFUSED, str(error))
        except Exception as error:
            return self._ended(Outcome.CRASHED, f"export: {type(error).__name__}: {error}")
        try:
            worst, where = self._compare(running)
            if worst <= self._model.tolerance:
                return self._further(running, f"{worst:.0e}")
        except Exception as error:
            return self._ended(Outcome.CRASHED, f"{type(error).__name__}: {error}")
        return self._judge(f"off by {worst:.0e} at {where}")

    def _further(self, running: Running, detail: str) -> Trial:
        """An export that keeps everything is right; is it so when cut, verified, and run?"""
        if self._depth.cut and self._cut_layer() is not None:
            worst = self._compare_cut()
            if worst > self._model.tolerance:
                return self._ended(Outcome.WRONG, f"cut: off by {worst:.0e}")
        depth = self._depth
        more = (
            (depth.again, self._again), (depth.last, self._last), (depth.sparse, self._sparse),
        )  # fmt: skip
        for wanted, compare in more:
            worst = compare(running) if wanted else 0.0
            if worst > self._model.tolerance:
                return self._ended(Outcome.WRONG, f"{compare.__name__}: off by {worst:.0e}")
        if self._depth.verify:
            try:
                self._export("verified", _SMALL, verify=True, blocks=self._blocks(0.9))
            except TriangleMixError as error:
                strange = unfed(Manifest.load(self._folder / "plain").inputs)
                outcome = Outcome.NOT_RUN if strange else Outcome.FALSE_ALARM
                return self._ended(outcome, str(error))
            except Exception as error:
                return self._ended(Outcome.CRASHED, f"verify: {type(error).__name__}: {error}")
        if self._depth.run:
            trouble = self._run(running)
            if trouble is not None:
                return trouble
        return self._ended(Outcome.RIGHT, detail)

    def _judge(self, detail: str) -> Trial:
        try:
            self._export("verified", _SMALL, verify=True)
        except TriangleMixError as error:
            return self._ended(Outcome.CAUGHT, f"{detail}; {error}")
        except Exception as error:
            return self._ended(Outcome.CRASHED, f"verify: {type(error).__name__}: {error}")
        return self._ended(Outcome.WRONG, detail)

    def _ended(self, outcome: Outcome, detail: str) -> Trial:
        return Trial(self._model, outcome, " ".join(detail.split())[:400])

    def _write(self, name: str, triangle: Triangle | None) -> Path:
        path = self._folder / name / "model.onnx"
        path.parent.mkdir()
        store(write_model(self._model, triangle), path, self._model.storage)
        return path

    def _export(self, name: str, pattern: PatternRequest, **options: Any) -> Path:
        output = self._folder / name
        layer = self._cut_layer()
        layers = LayerRequest(layers=None if layer is None else (layer,))
        dense = layer is None  # every layer slides a window of its own
        export(
            ExportOptions(
                self._folder / "source" / "model.onnx",
                output,
                pattern=pattern,
                layers=LayerRequest() if dense else layers,
                dense=dense,
                force=True,
                **options,
            ),
            SilentObserver(),
        )
        return output / "model.onnx"

    def _cut_layer(self) -> int | None:
        """The deepest layer that slides no window."""
        return max(self._free_layers(), default=None)

    def _free_layers(self) -> tuple[int, ...]:
        """Layers that slide no window."""
        causal = self._model.family == "causal"
        return tuple(
            layer
            for layer in range(self._model.num_layers)
            if causal or layer not in self._model.window_layers
        )

    def _blocks(self, mass: float) -> BlockRequest:
        """Every layer that slides no window, but for the triangle layer."""
        triangle = self._cut_layer()
        free = () if triangle is None else self._free_layers()
        layers = tuple(x for x in free if x != triangle)
        return BlockRequest(layers, mass, 0) if layers else BlockRequest()

    def _compare(self, running: Running) -> tuple[float, Call | None]:
        exported = Running(self._folder / "plain" / "model.onnx", self._model)
        manifest = Manifest.load(self._folder / "plain")
        dense_twin = self._cut_layer() is None
        calls = calls_of(self._model, pads=manifest.left_padding, chunks=not dense_twin)
        return self._worst(exported, running, calls)

    def _worst(
        self, exported: Running, running: Running, calls: Iterable[Call]
    ) -> tuple[float, Call | None]:
        """The largest difference, and the call that shows it."""
        worst, where = 0.0, None
        for call in calls:
            try:
                theirs = running.logits(call, self._model.seed)
            except Exception:  # the source takes no such call
                continue
            error = difference(exported.logits(call, self._model.seed), theirs)
            if error > worst:
                worst, where = error, call
        return worst, where

    def _compare_cut(self) -> float:
        layer = self._cut_layer()
        assert layer is not None
        triangle = Triangle(layer, *_SMALL_SIZES)
        reference = Running(self._write("reference", triangle), self._model)
        exported = Running(self._export("cut", _SMALL), self._model)
        call = Call(_CUT_PROMPT)
        seed = self._model.seed
        return difference(exported.logits(call, seed), reference.logits(call, seed))

    def _again(self, running: Running) -> float:
        """An export of the export, all names in which are others."""
        path = self._folder / "plain" / "model.onnx"
        model = ir.load(path)
        rename_all(model)
        renamed = self._folder / "renamed" / "model.onnx"
        renamed.parent.mkdir()
        for file in path.parent.iterdir():
            if file.is_file():
                shutil.copy(file, renamed.parent / file.name)
        ir.save(model, renamed)
        output = self._folder / "again"
        export(ExportOptions(renamed, output, dense=True, force=True), SilentObserver())
        calls = calls_of(self._model, pads=False, chunks=False)
        return self._worst(Running(output / "model.onnx", self._model), running, calls)[0]

    def _last(self, running: Running) -> float:
        """The last row alone."""
        exported = Running(self._export("last", _KEEP_ALL, last_token_logits=True), self._model)
        call, seed = Call(self._model.size + 3 if self._model.size < 200 else 60), self._model.seed
        return difference(exported.logits(call, seed)[-1:], running.logits(call, seed)[-1:])

    def _sparse(self, running: Running) -> float:
        """Mass 1 in the other layers, which keeps everything."""
        blocks = self._blocks(1.0)
        if not blocks.layers:
            return 0.0
        exported = Running(self._export("sparse", _KEEP_ALL, blocks=blocks), self._model)
        padding = Manifest.load(self._folder / "sparse").left_padding
        return self._worst(exported, running, calls_of(self._model, pads=padding, chunks=True))[0]

    def _run(self, running: Running) -> Trial | None:
        """The runtime's greedy tokens beside the source's; a refusal at once is no fault."""
        prompt = np.random.default_rng(self._model.seed).integers(0, VOCABULARY, 30).tolist()
        try:
            session = TriangleSession.from_folder(self._folder / "plain")
            session.stop_ids = frozenset()
            result = session.generate(prompt, max_new_tokens=_NEW_TOKENS)
        except ExecutionError as error:  # ONNX Runtime refused what the runtime fed
            return self._ended(Outcome.CRASHED, f"runtime: {error}")
        except TriangleMixError as error:  # said before anything ran
            return self._ended(Outcome.NOT_RUN, str(error))
        except Exception as error:
            return self._ended(Outcome.CRASHED, f"runtime: {type(error).__name__}: {error}")
        tokens = list(result.ids)
        wanted = _greedy(self._folder / "source" / "model.onnx", self._model, prompt)
        if tokens != wanted:
            return self._ended(Outcome.WRONG, f"runtime: tokens {tokens}, not {wanted}")
        return None


def _greedy(path: Path, model: OddModel, prompt: list[int]) -> list[int]:
    """Tokens of the source, each from a run of the whole text, which needs no cache."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    tokens = list(prompt)
    for _ in range(_NEW_TOKENS):
        feeds = make_feeds(model, Call(len(tokens)), 0)
        feeds["input_ids"] = np.array([tokens]).astype(model.ids_dtype)
        (logits,) = session.run(["logits"], feeds)
        tokens.append(int(np.asarray(logits)[0, -1].argmax()))
    return tokens[len(prompt) :]
