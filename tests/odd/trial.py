"""One odd model through the product: exported and compared with its own source, or refused."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from trianglemix.custom_ops.errors import TriangleMixError
from trianglemix.custom_ops.manifest import Manifest
from trianglemix.exporter.options import ExportOptions, LayerRequest, PatternRequest
from trianglemix.exporter.pipeline import export
from trianglemix.runtime import TriangleSession
from trianglemix.runtime.errors import ExecutionError

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

    @classmethod
    def of(cls, seed: int) -> Depth:
        """By turns: a fourth of the seeds verify, a fourth run, half are cut."""
        return cls(verify=seed % 4 == 0, run=seed % 4 == 1, cut=seed % 2 == 1)


def run_trial(seed: int, depth: Depth | None = None) -> Trial:
    """Writes the model of a seed, exports it and compares."""
    model = draw_model(seed)
    with tempfile.TemporaryDirectory(prefix="odd-") as place:
        return _Bench(model, Path(place), depth or Depth.of(seed)).trial()


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
            return self._ended(Outcome.CRASHED, f"compare: {type(error).__name__}: {error}")
        return self._judge(f"off by {worst:.0e} at {where}")

    def _further(self, running: Running, detail: str) -> Trial:
        """An export that keeps everything is right; is it so when cut, verified, and run?"""
        if self._depth.cut and self._cut_layer() is not None:
            worst = self._compare_cut()
            if worst > self._model.tolerance:
                return self._ended(Outcome.WRONG, f"cut: off by {worst:.0e}")
        if self._depth.verify:
            try:
                self._export("verified", _SMALL, verify=True)
            except TriangleMixError as error:
                return self._ended(Outcome.FALSE_ALARM, str(error))
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
        onnx.save(write_model(self._model, triangle), path)
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
        causal = self._model.family == "causal"
        free = [x for x in range(self._model.num_layers)
                if causal or x not in self._model.window_layers]  # fmt: skip
        return max(free) if free else None

    def _compare(self, running: Running) -> tuple[float, Call | None]:
        exported = Running(self._folder / "plain" / "model.onnx", self._model)
        manifest = Manifest.load(self._folder / "plain")
        worst, where = 0.0, None
        for call in calls_of(self._model, left_padding=manifest.left_padding):
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

    def _run(self, running: Running) -> Trial | None:
        """The runtime's greedy tokens beside the source's; a refusal at once is no fault."""
        prompt = np.random.default_rng(self._model.seed).integers(0, VOCABULARY, 30).tolist()
        try:
            session = TriangleSession.from_folder(self._folder / "plain")
            session.stop_ids = frozenset()
            result = session.generate(prompt, max_new_tokens=_NEW_TOKENS)
        except ExecutionError as error:  # ONNX Runtime refused what the runtime fed
            return self._ended(Outcome.CRASHED, f"runtime: {error}")
        except TriangleMixError as error:
            return self._ended(Outcome.REFUSED, f"by the runtime: {error}")
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
