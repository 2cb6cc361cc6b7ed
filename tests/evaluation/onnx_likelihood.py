"""A small exported folder, and log-likelihoods and answers straight from its ONNX graph's logits.

Nothing of the runtime is used: each text goes through the graph in one pass, with `prompt_length`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from trianglemix.exporter.options import ExportOptions, LayerRequest, PatternRequest
from trianglemix.exporter.pipeline import export
from trianglemix.manifest.manifest import Manifest

from tests.sources.cell import SilentObserver
from tests.sources.decoder import Decoder
from tests.sources.oracle import Text
from tests.tiny_models import tiny_model

PATTERN: Final = PatternRequest(4, 24, 8)
CONTEXT: Final = 160
"""Tokens that the folder's model takes; texts of the tests are longer and shorter than that."""
BEGINNING: Final = 256
"""`<s>`, which the tokenizer names and does not add."""
TOLERANCE: Final = 2e-3


def export_small_folder(output: Path, *, dense: bool = False) -> Path:
    """A tiny Llama with triangle layers 1 and 2, the logits of all tokens, and a short context."""
    options = ExportOptions(
        source=tiny_model("llama").path,
        output=output,
        layers=LayerRequest(layers=None if dense else (1, 2)),
        pattern=PATTERN,
        dense=dense,
    )
    export(options, SilentObserver())
    path = output / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(manifest | {"context_length": CONTEXT}), encoding="utf-8")
    return output


class OnnxLikelihood:
    """The folder's graph in ONNX Runtime, and its tokenizer."""

    def __init__(self, folder: Path) -> None:
        manifest = Manifest.load(folder)
        self._decoder = Decoder(folder / "model.onnx", manifest, kernel=True)
        self._tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(self, text: str) -> list[int]:
        """Token ids; a special token is one."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def continuation(self, context: str, continuation: str) -> tuple[float, bool]:
        """Log-likelihood after the context, the prompt; whether each token is the best one."""
        prompt, following = self.encode(context), self.encode(continuation)
        prompt = prompt[-(CONTEXT - len(following) + 1) :]
        logs = self._logs([*prompt, *following], len(prompt))[len(prompt) - 1 : -1]
        return _sum(logs, following), bool((logs.argmax(-1) == following).all())

    def dense_continuation(self, context: str, continuation: str) -> float:
        """The same if nothing were dropped: with a prompt of one token no row streams."""
        prompt, following = self.encode(context), self.encode(continuation)
        logs = self._logs([*prompt, *following], 1)
        return _sum(logs[len(prompt) - 1 : -1], following)

    def window(self, read: Sequence[int], following: Sequence[int]) -> float:
        """Log-likelihood of the tokens that follow the last ones of `read`, which is one prompt."""
        return _sum(self._logs(read, len(read))[-len(following) :], following)

    def answer(self, context: str, count: int) -> str:
        """The greedy answer of `count` tokens, the whole text read anew for each of them."""
        ids = self.encode(context)[-(CONTEXT - count) :]
        prompt = len(ids)
        for _ in range(count):
            ids.append(int(self._logs(ids, prompt)[-1].argmax()))
        text: str = self._tokenizer.decode(ids[prompt:], skip_special_tokens=True)
        return text

    def _logs(self, ids: Sequence[int], prompt_length: int) -> NDArray[np.float64]:
        """Log-probabilities `[N, vocabulary]` after each token."""
        text = Text(np.array([ids], np.int64), np.zeros(1, np.int64))
        logits = self._decoder.logits(text, [len(ids)], prompt_length)[0]
        logs: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return logs


def _sum(logs: NDArray[np.float64], ids: Sequence[int]) -> float:
    return float(logs[np.arange(len(ids)), ids].sum())
