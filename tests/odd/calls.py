"""Runs a source and its export side by side: the calls, their inputs, how far apart they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from trianglemix.custom_ops.library import library_path

from tests.odd.decoder import PAST
from tests.odd.masks import MASKS, SEGMENTS
from tests.odd.odd_model import HEAD_SIZE, HIDDEN, VOCABULARY, OddModel

Array = NDArray[Any]
LONGEST_PROMPT: Final = 360
"""Tokens of a whole prompt; further on single rows over a long random past are compared."""
PADS: Final = 3


@dataclass(frozen=True)
class Call:
    """New tokens over so many slots of a random past; `pads` stand left of the last row."""

    length: int
    past: int = 0
    batch: int = 1
    pads: int = 0


class Running:
    """A session over an odd model or an export of it: both have the same interface."""

    def __init__(self, path: Path, model: OddModel) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.register_custom_ops_library(str(library_path()))
        self._model = model
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def logits(self, call: Call, seed: int) -> Array:
        """Logits of the real rows, `[n, vocabulary]`."""
        feeds = make_feeds(self._model, call, seed)
        (logits,) = self._session.run(["logits"], feeds)
        real = np.ones((call.batch, call.length), bool)
        real[-1, : call.pads] = False
        return np.asarray(logits)[real[:, -logits.shape[1] :]]


def make_feeds(model: OddModel, call: Call, seed: int) -> dict[str, Array]:
    """Random tokens and a random past; written from the model's description, not by the product."""
    random = np.random.default_rng([seed, call.length, call.past])
    batch, length, total = call.batch, call.length, call.past + call.length
    ids = random.integers(0, VOCABULARY, (batch, length))
    if MASKS[model.mask].uncached:
        ids[:, random.integers(0, length, max(1, length // 9))] = model.size
    mask = np.ones((batch, total))
    mask[-1, : call.pads] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int64)[:, call.past :]
    if model.mask in SEGMENTS:
        mask[:, : total // 2] *= 2
    feeds = {
        "input_ids": ids.astype(model.ids_dtype),
        "attention_mask": mask.astype(model.mask_dtype),
    }
    if model.positions == "rank1":
        feeds["position_ids"] = positions[0]
    if model.positions == "rank2":
        feeds["position_ids"] = positions
    if model.positions == "rank3":
        feeds["position_ids"] = np.tile(positions, (3, 1, 1))
    if model.extra == "token_types":
        feeds["token_type_ids"] = np.zeros((batch, length), np.int64)
    if model.extra == "cache_position":
        feeds["cache_position"] = np.arange(call.past, total)
    if model.extra == "temperature":
        feeds["temperature"] = np.array(1.5, np.float32)
    if model.extra == "convolution":
        state = random.standard_normal((batch, HIDDEN, 2)) if call.past else 0
        feeds["past_conv.0"] = (np.zeros((batch, HIDDEN, 2)) + state).astype(model.dtype)
    if model.extra == "keep_logits":
        feeds["num_logits_to_keep"] = np.array(0, np.int64)
    for layer in model.cached_layers:
        for name in ("key", "value"):
            shape = [batch, model.kv_heads, call.past, HEAD_SIZE]
            if model.cache == "BTHD":
                shape[1], shape[2] = shape[2], shape[1]
            past = random.standard_normal(shape).astype(model.cache_dtype)
            feeds[PAST.format(layer, name)] = past
    return feeds


def calls_of(model: OddModel, *, pads: bool, chunks: bool) -> Iterator[Call]:
    """Prompts and single rows up to `model.reach`; decode steps and chunks where there is a cache.

    A prompt is as long as the threshold of the mask, a little longer, and up to four times that.
    `pads` and `chunks` (several tokens after a past) only where the export takes them, as a dense
    twin, which is made of GroupQueryAttention, does not.
    """
    size, reach = model.size, model.reach
    whole = sorted({min(n, LONGEST_PROMPT, reach) for n in (6, size + 3, 2 * size + 5, reach)})
    yield from (Call(length) for length in whole)
    if model.batch != 1:
        yield Call(min(size + 9, LONGEST_PROMPT), batch=2)
        if pads:
            yield Call(min(size + 9, LONGEST_PROMPT), batch=2, pads=PADS)
    if model.cache == "none":
        return
    for past in sorted({5, *(min(n, reach - 2) for n in (size - 1, size, size + 4, reach))}):
        yield Call(1, past)
    if chunks and model.spelling != "group_query":  # whose kernel takes one token after a past
        yield Call(3, min(size + 1, reach - 4))


def difference(ours: Array, theirs: Array) -> float:
    """Largest difference as a share of the largest number; infinite for another shape, or NaN."""
    if ours.shape != theirs.shape:
        return float("inf")
    error = float(np.abs(ours - theirs).max() / max(1e-9, float(np.abs(theirs).max())))
    return error if np.isfinite(error) else float("inf")
