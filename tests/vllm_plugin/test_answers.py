"""The figures of `benchmarks.vllm_answers`: which answers count as the same, and whose."""

from __future__ import annotations

from typing import Any

from benchmarks.paired_answers import Unit
from benchmarks.vllm_answers import _figures, _paired

UNITS = [Unit("retrieval", "a", 100, (1, 3), ("triangle", "dense")),
         Unit("retrieval", "b", 100, (2,), ("triangle", "dense"))]  # fmt: skip


def _here(triangle: list[str], dense: list[str]) -> dict[str, Any]:
    ways = {"triangle": triangle, "dense": dense}
    answers = {way: {"texts": texts, "scores": [float(text == "right") for text in texts]}
               for way, texts in ways.items()}  # fmt: skip
    return {"lengths": [90] * len(triangle), "answers": answers}


def _served(texts: list[str], seconds: float) -> dict[str, Any]:
    scores = [float(text == "right") for text in texts]
    return {"texts": texts, "scores": scores, "seconds": [seconds] * len(texts)}


def test_samples_of_all_units_are_paired_in_their_order() -> None:
    patched = [_here(["right", "x"], ["right", "y"]), _here(["right"], ["right"])]
    served = {
        "triangle": _served(["right", "z", "x"], 0.3),
        "dense": _served(["right", "y", "x"], 0.6),
    }
    samples = _paired(UNITS, patched, served)
    assert [(s["task"], s["seed"], s["tokens"]) for s in samples] == [
        ("a", 1, 90), ("a", 3, 90), ("b", 2, 90)
    ]  # fmt: skip
    figures = _figures(samples, ["triangle", "dense"])
    assert figures["samples"] == 3
    triangle, dense = figures["triangle"], figures["dense"]
    assert (triangle["same_answers"], triangle["same_verdict"]) == (1, 2)
    assert (dense["same_answers"], dense["same_verdict"]) == (2, 2)
    assert triangle["differ_from_dense"] == 1
    assert triangle["first_token_ratio"]["median"] == 0.5
    assert triangle["right_served"]["mean"] == 1 / 3
    assert triangle["right_patched"] == 2 / 3
    assert triangle["difference"]["mean"] == -1 / 3
