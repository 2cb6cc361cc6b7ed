"""The choice of layers: ranking, rules, the sensitivity check, and going on after a break."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from trianglemix.analysis import TriangleMixAnalyzer
from trianglemix.analysis.check import check_plan
from trianglemix.analysis.errors import AnalysisError
from trianglemix.analysis.record import Record, probe_all
from trianglemix.analysis.sections import LayerGradients, ProbeSample
from trianglemix.analysis.select import (
    importance_of,
    layers_under_threshold,
    rank_correlation,
    ranked_layers,
)


def _gradients(middle: Sequence[float]) -> LayerGradients:
    return LayerGradients([[1.0, -m, 2.0] for m in middle], [[1.0, m, 2.0] for m in middle])


def test_layers_are_ranked_by_their_middle_and_equals_by_depth() -> None:
    importance = importance_of([_gradients([8, 1, 4, 1]), _gradients([6, 3, 4, 3])])
    assert importance.middle.tolist() == [7, 2, 4, 2]
    assert ranked_layers(importance, range(4)) == (3, 1, 2, 0)
    assert ranked_layers(importance, (0, 2)) == (2, 0)
    assert layers_under_threshold(importance, (3, 1, 2, 0), 0.3) == (3, 1)


def test_rank_correlation_knows_order_and_its_reverse() -> None:
    a = np.array([1.0, 5.0, 2.0, 9.0])
    assert rank_correlation(a, a**3) == pytest.approx(1.0)
    assert rank_correlation(a, -a) == pytest.approx(-1.0)


def test_prompts_without_a_middle_section_are_refused() -> None:
    with pytest.raises(AnalysisError, match="longer prompts"):
        importance_of([_gradients([0, 0])])


def test_analyzer_takes_gradients_of_both_signs() -> None:
    analyzer = TriangleMixAnalyzer(3)
    for layer, size in enumerate((3.0, 1.0, 2.0)):
        analyzer.record_middle_qk_gradient(layer, size * torch.tensor([[1.0, -1.0]]))
    assert analyzer.get_triangle_layers(1) == [1]
    assert analyzer.get_triangle_layers(2) == [1, 2]
    for count in (0, 4):
        with pytest.raises(AnalysisError, match=str(count)):
            analyzer.get_triangle_layers(count)
    analyzer.reset()
    with pytest.raises(AnalysisError, match=r"\[0, 1, 2\]"):
        analyzer.get_triangle_layers(1)
    with pytest.raises(AnalysisError, match="7"):
        analyzer.record_middle_qk_gradient(7, torch.ones(2))


class _Model:
    """Right in 80 of 100 samples, less 30 for each of the layers 0 and 1 that is a triangle."""

    def __init__(self, harm: int = 30) -> None:
        self.harm = harm
        self.asked: list[tuple[int, ...]] = []

    def __call__(self, layers: Sequence[int]) -> list[float]:
        self.asked.append(tuple(sorted(layers)))
        right = 80 - self.harm * len({0, 1} & set(layers))
        return [1.0] * right + [0.0] * (100 - right)


RANKED = (5, 4, 3, 2, 1, 0)


def test_the_check_takes_the_largest_set_that_costs_nothing() -> None:
    model = _Model()
    check = check_plan([RANKED[:n] for n in (6, 5, 4, 2)], RANKED, model, 0.02)
    assert check.verdict == "accepted"
    assert check.layers == (2, 3, 4, 5)
    assert [len(trial.layers) for trial in check.trials] == [6, 5, 4]
    assert check.control.difference.mean == pytest.approx(-0.6)


def test_the_check_rejects_a_bad_plan_and_admits_that_it_is_blind() -> None:
    rejected = check_plan([(0, 1, 2)], RANKED, _Model(), 0.02)
    assert rejected.verdict == "rejected"
    assert rejected.layers == ()
    assert check_plan([(4, 5)], RANKED, _Model(harm=0), 0.02).verdict == "blind"
    with pytest.raises(AnalysisError, match="no layers"):
        check_plan([()], RANKED, _Model(), 0.02)


def test_a_broken_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    samples = [ProbeSample((n,), n) for n in range(5)]
    record = Record(tmp_path / "probe.jsonl", {"model": "a", "layers": (1, 2)}, LayerGradients)
    probed: list[int] = []

    def probe(sample: ProbeSample) -> LayerGradients:
        if len(probed) == 3:
            raise KeyboardInterrupt
        probed.append(sample.answer)
        return _gradients([sample.answer, 1])

    with pytest.raises(KeyboardInterrupt):
        probe_all(samples, probe, record, lambda n: None)
    with (tmp_path / "probe.jsonl").open("a") as file:
        file.write('{"mean": [[1')  # as if the machine had stopped in the middle of a line
    again: list[int] = []

    def go_on(sample: ProbeSample) -> LayerGradients:
        again.append(sample.answer)
        return _gradients([sample.answer, 1])

    done = probe_all(samples, go_on, record, lambda n: None)
    assert (probed, again) == ([0, 1, 2], [3, 4])
    assert [g.mean_abs[0][1] for g in done] == [0, 1, 2, 3, 4]
    with pytest.raises(AnalysisError, match="another analysis"):
        Record(tmp_path / "probe.jsonl", {"model": "b"}, LayerGradients).load()
    assert json.loads((tmp_path / "probe.jsonl").read_text().splitlines()[0])["model"] == "a"
