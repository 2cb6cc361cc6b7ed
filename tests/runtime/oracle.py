"""Greedy generation without a cache: every token from a fresh pass over the whole text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
from trianglemix.manifest.manifest import Manifest

Presents = dict[str, np.ndarray]


class Oracle:
    """The folder's model on the function body, fed by hand, one row and one call at a time."""

    def __init__(self, folder: Path) -> None:
        self.manifest = Manifest.load(folder)
        path = folder / self.manifest.model_file
        self.session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])

    def step(
        self, ids: list[int], prompt_length: int, past: Presents | None = None
    ) -> tuple[np.ndarray, Presents]:
        """Logits of the last token, and the present tensors by the names of the past ones."""
        held = 0 if past is None else next(iter(past.values())).shape[2]
        feeds = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, held + len(ids)), np.int64),
            "position_ids": np.arange(held, held + len(ids), dtype=np.int64)[None],
            "prompt_length": np.array([prompt_length], np.int32),
        }
        known = [*self.session.get_inputs(), *self.session.get_overridable_initializers()]
        names = {value.name for value in known}
        feeds = {name: value for name, value in feeds.items() if name in names}
        for layer in self.manifest.cache:
            empty = np.zeros((1, layer.kv_num_heads, 0, layer.head_size), self.manifest.cache_dtype)
            for name in (layer.past_key, layer.past_value):
                feeds[name] = empty if past is None else past[name]
        outputs = dict(
            zip(
                [value.name for value in self.session.get_outputs()],
                self.session.run(None, feeds),
                strict=True,
            )
        )
        present = {}
        for layer in self.manifest.cache:
            present[layer.past_key] = outputs[layer.present_key]
            present[layer.past_value] = outputs[layer.present_value]
        return outputs["logits"][0, -1], present

    def tokens(self, prompt: list[int], count: int) -> list[int]:
        """`count` greedy tokens after `prompt`."""
        ids = list(prompt)
        for _ in range(count):
            logits, _ = self.step(ids, len(prompt))
            ids.append(int(np.argmax(logits)))
        return ids[len(prompt) :]
