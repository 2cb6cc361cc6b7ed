"""One attention in many spellings: each is exported, and gives its source's numbers.

Seeded draws from `spellings.CHOICES`, after every choice once by itself.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from trianglemix.custom_ops.library import library_path
from trianglemix.exporter.options import PatternRequest

from tests.exporter.exports import Array, export_to, random_ids, save_example
from tests.exporter.patterns.spellings import CHOICES, Spelling, draw, spelled

_KEEP_ALL = PatternRequest(4, 64, 8)
_DRAWS = 20
_PADS = 2
_NEW = 3
_SINGLE = [(name, choice) for name, choices in CHOICES.items() for choice in choices[1:]]


class _Model:
    """A model file, called the way its own inputs say."""

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.register_custom_ops_library(str(library_path()))
        self._session = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])

    def run(self, ids: Array, mask: Array, before: dict[str, Array] | None) -> dict[str, Array]:
        feeds: dict[str, Array] = {"input_ids": ids, "attention_mask": mask}
        for value in self._session.get_inputs():
            if value.name.startswith("past"):
                half = value.type == "tensor(float16)"
                sizes = [x if isinstance(x, int) else 0 for x in value.shape]
                sizes[0] = len(ids)
                empty = np.zeros(sizes, np.float16 if half else np.float32)
                present = value.name.replace("past_key_values", "present")
                feeds[value.name] = empty if before is None else before[present]
        names = [value.name for value in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, feeds), strict=True))

    def two_calls(
        self, ids: Array, pads: int, new: int
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """A prompt of all but the `new` last tokens, the second row padded; then these."""
        mask = np.ones_like(ids)
        mask[1, :pads] = 0
        first = self.run(ids[:, :-new], mask[:, :-new], None)
        return first, self.run(ids[:, -new:], mask, first)


def _check(spelling: Spelling, folder: Path, seed: int = 0, *, dense: bool = False) -> None:
    path = save_example(spelled(spelling, seed).model, folder / "source")
    layers = None if dense else (0, 1, 2)
    export_to(path, folder / "out", layers=layers, pattern=_KEEP_ALL, dense=dense)
    ids = random_ids(2, 21)
    unpadded = dense or spelling.softmax == "plain_parts"  # exp(-inf) in all of a row is 0/0
    pads = 0 if unpadded else _PADS
    new = 1 if dense else _NEW  # GroupQueryAttention takes no chunks of a batch
    ours = _Model(folder / "out" / "model.onnx").two_calls(ids, pads, new)
    theirs = _Model(path).two_calls(ids, pads, new)
    tolerance = 2e-2 if spelling.is_half else 2e-5
    for mine, wanted in zip(ours, theirs, strict=True):
        for name, expected in wanted.items():
            assert mine[name].dtype == expected.dtype, name
            assert mine[name].shape == expected.shape, name
            a, b = (_without_pads(x, name).astype(np.float32) for x in (mine[name], expected))
            error = float(np.abs(a - b).max()) / max(1.0, float(np.abs(b).max()))
            assert error <= tolerance, f"{name} is off by {error:.1e}: {spelling}"


def _without_pads(output: Array, name: str) -> Array:
    """Rows of logits that are real in every row of the batch; of a cache the unpadded row."""
    if name != "logits":
        return output[:1]
    return output[:, _PADS:] if output.shape[1] > _NEW else output


@pytest.mark.parametrize(("name", "choice"), _SINGLE)
def test_one_other_spelling(name: str, choice: str, tmp_path: Path) -> None:
    _check(Spelling(**{name: choice}), tmp_path)


@pytest.mark.parametrize(
    "spelling", [Spelling(cache="BTHD"), Spelling(cache="BHDT"), Spelling(types="half_cache")]
)
def test_the_dense_twin_of_other_caches(spelling: Spelling, tmp_path: Path) -> None:
    """GroupQueryAttention in all layers; its past is none of the graph's inputs."""
    _check(spelling, tmp_path, dense=True)


@pytest.mark.parametrize("seed", range(_DRAWS))
def test_spellings_together(seed: int, tmp_path: Path) -> None:
    _check(draw(seed), tmp_path, seed)
