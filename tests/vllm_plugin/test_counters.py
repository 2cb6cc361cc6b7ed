"""Counts of rows: kept by a worker, added up by the front end, in the log."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from trianglemix.vllm import counters
from trianglemix.vllm.counters import CountBoard, describe, read_counts


def test_counts_of_a_worker_are_read_elsewhere(tmp_path: Path) -> None:
    board = CountBoard(tmp_path)
    one, two = board.count_layers([(1, "triangle"), (5, "block_sparse")])
    one.add(100, 7)
    one.add(50, 0)
    two.add(3, 4)
    (third,) = board.count_layers([(6, "triangle")])
    third.add(0, 1)
    assert read_counts([tmp_path]) == {
        1: {"triangle": 150, "dense": 7},
        5: {"block_sparse": 3, "dense": 4},
        6: {"triangle": 0, "dense": 1},
    }
    other = (
        "import sys; from pathlib import Path; from trianglemix.vllm.counters import CountBoard\n"
        "CountBoard(Path(sys.argv[1])).count_layers([(5, 'block_sparse')])[0].add(10, 20)"
    )
    subprocess.run([sys.executable, "-c", other, str(tmp_path)], check=True)
    assert read_counts([tmp_path])[5] == {"block_sparse": 13, "dense": 24}
    assert read_counts([tmp_path / "nowhere"]) == {}


def test_a_rank_without_a_file_counts_for_itself(tmp_path: Path) -> None:
    (count,) = CountBoard(None).count_layers([(1, "triangle")])
    count.add(5, 6)
    assert count.rows == {"triangle": 5, "dense": 6}
    assert CountBoard(None).count_layers([]) == []


def test_the_log_says_layers_of_like_counts_together(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    board = CountBoard(None)
    roles = [*((layer, "triangle") for layer in (1, 2, 3, 7)), (4, "block_sparse")]
    for count in board.count_layers(roles):
        count.add(9, 1)
    board.counts[3].add(1, 0)
    assert describe(board.counts) == (
        "layers 1-3 triangle 9 dense 1, layers 7 triangle 10 dense 1, "
        "layers 4 block_sparse 9 dense 1"
    )
    with caplog.at_level(logging.INFO, "vllm.trianglemix"):
        board.log_sometimes()
        assert not caplog.records
        monkeypatch.setattr(counters, "LOG_SECONDS", -1.0)
        board.log_sometimes()
    assert "layers 1-3 triangle 9 dense 1" in caplog.text
