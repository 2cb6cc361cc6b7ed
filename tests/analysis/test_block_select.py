"""The written rule for block-sparse layers, the check on tasks, and what the command line says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from trianglemix.analysis.block_check import BlockKind, check_blocks
from trianglemix.analysis.block_command import parse_lengths, parse_masses
from trianglemix.analysis.block_select import (
    LOW_RECALL,
    MOST_KEPT,
    WORST_HEAD,
    choose_block_layers,
)
from trianglemix.analysis.block_shares import (
    BlockFigures,
    BlockSample,
    as_json,
    mean_figures,
    mean_of_layers,
)
from trianglemix.analysis.errors import AnalysisError
from trianglemix.custom_ops.errors import ConfigurationError

GOOD = BlockFigures(density=0.3, exact=0.3, recall=0.95, low=LOW_RECALL, worst=WORST_HEAD)
LOW = replace(GOOD, low=LOW_RECALL - 0.01)
HEAD = replace(GOOD, worst=WORST_HEAD - 0.01)
FULL = replace(GOOD, density=MOST_KEPT + 0.01)
SHORT = {8: {0.8: LOW, 0.9: LOW, 0.95: LOW}}


def test_the_smallest_mass_that_serves_all_layers_is_taken() -> None:
    table = {
        2: {0.8: GOOD, 0.9: GOOD, 0.95: GOOD},
        5: {0.8: LOW, 0.9: GOOD, 0.95: FULL},
        7: {0.8: GOOD, 0.9: FULL, 0.95: FULL},
        8: {0.8: GOOD, 0.9: GOOD, 0.95: HEAD},
    }
    choice = choose_block_layers({4000: SHORT, 16000: table})
    assert (choice.layers, choice.rule.mass, choice.rule.min_length) == ((2, 5), 0.9, 3500)
    assert sorted(choice.left_out) == [7, 8]
    assert "keeps 0.61" in choice.left_out[7]
    assert "0.74 in its worst head at mass 0.95" in choice.left_out[8]


def test_no_layer_is_an_error_with_the_reasons() -> None:
    with pytest.raises(AnalysisError, match=r"layer 3 has recall 0\.69 .*; layer 4 keeps 0\.61"):
        choose_block_layers({4000: {3: {0.9: LOW}, 4: {0.9: FULL}}})


@pytest.mark.parametrize(("figures", "advice"), [(FULL, "smaller ones"), (HEAD, "a larger one")])
def test_other_masses_are_advised_by_what_was_wrong(figures: BlockFigures, advice: str) -> None:
    with pytest.raises(AnalysisError, match=f"other masses: {advice}"):
        choose_block_layers({4000: {3: {0.9: figures}}})


def test_means_are_by_length_layer_and_mass() -> None:
    rows = [
        BlockSample(100, [[[0.2] * 5, [0.4] * 5], [[0.6] * 5, [0.8] * 5]]),
        BlockSample(100, [[[0.4] * 5, [0.6] * 5], [[0.8] * 5, [1.0] * 5]]),
        BlockSample(200, [[[0.1] * 5] * 2] * 2),
    ]
    measured = mean_figures(rows, (3, 9), (0.5, 0.9))
    assert measured[100][9][0.5].low == pytest.approx(0.7)
    assert measured[200][3][0.9].density == pytest.approx(0.1)
    assert mean_of_layers(measured[100], 0.9).recall == pytest.approx(0.7)
    assert as_json(measured)["100"]["3"]["0.9"]["worst"] == 0.5


@pytest.mark.parametrize(
    ("rule", "random", "verdict"),
    [(0.5, 0.1, "accepted"), (0.5, 0.5, "blind"), (0.1, 0.1, "rejected"), (0.4, 0.45, "rejected")],
)
def test_verdicts(rule: float, random: float, verdict: str) -> None:
    shares = {"none": 0.5, "rule": rule, "random": random}

    def score(kind: BlockKind) -> list[float]:
        return [float(n < 60 * shares[kind]) for n in range(60)]

    check = check_blocks((1, 2), score, 0.05)
    assert check.verdict == verdict
    assert check.rule.difference.mean == pytest.approx(rule - 0.5)
    assert check.control.layers == (1, 2)


def test_lists_of_numbers_are_read_or_refused() -> None:
    assert parse_lengths("8000,4000,8000") == (4000, 8000)
    assert parse_masses(".95,0.8") == (0.8, 0.95)
    for text, words in (
        ("many", "no list of numbers"), ("nan", "no list"), ("inf", "no list"),
        ("4000.5", "no list"), ("100", "at least 1024"),
    ):  # fmt: skip
        with pytest.raises(ConfigurationError, match=words):
            parse_lengths(text)
    with pytest.raises(ConfigurationError, match=r"mass is 1.5"):
        parse_masses("0.5,1.5")
