"""How prompt lengths reach a step, on objects of the shape of vLLM's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from trianglemix.vllm.errors import ServingError
from trianglemix.vllm.prompt_lengths import (
    ENDLESS,
    StepLengths,
    ask_for_prompt_lengths,
    step_lengths,
)
from trianglemix.vllm.roles import Keeps
from trianglemix.vllm.row_split import Request, split_rows

from tests.vllm_plugin.test_row_split import PATTERNS, RULES, steps


class _Model:
    def __init__(self, window: int | None, follows: bool = True) -> None:
        self.model_arch_config = SimpleNamespace(rswa_window=window)
        self._frozen = None if follows else (window,)

    @property
    def rswa_window(self) -> int | None:
        given: int | None = self.model_arch_config.rswa_window
        return given if self._frozen is None else self._frozen[0]


def _metadata(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{
        "query_start_loc_cpu": torch.tensor([0, 5, 6, 6]),
        "seq_lens_cpu_upper_bound": torch.tensor([9, 4, 0]),
        "seq_lens": torch.tensor([9, 4, 0]),
        "rswa_prefix_lens": torch.tensor([12, 3, 77]),
        "max_query_len": 5,
    } | changes)  # fmt: skip


def test_lengths_are_asked_for_once_or_twice() -> None:
    model = _Model(None)
    for _ in range(2):
        ask_for_prompt_lengths(model)
        assert model.rswa_window == ENDLESS


@pytest.mark.parametrize(
    ("model", "words"),
    [(_Model(128), "a window behind a reference of 128"), (_Model(None, False), "does not take")],
)
def test_a_model_that_would_not_hand_them_over(model: _Model, words: str) -> None:
    with pytest.raises(ServingError, match=words):
        ask_for_prompt_lengths(model)


def test_requests_of_a_step() -> None:
    expected = (Request(0, 5, 9, 12), Request(5, 6, 4, 3), Request(6, 6, 0, 77))
    for lengths in (
        step_lengths(_metadata()),
        step_lengths(_metadata(seq_lens_cpu_upper_bound=None)),
    ):
        assert lengths is not None
        assert lengths.requests == expected


@given(steps(longest=600), PATTERNS | RULES)
def test_a_step_with_rows_of_ours_is_noticed(requests: list[Request], keeps: Keeps) -> None:
    lengths = StepLengths(
        np.array([0, *(r.end for r in requests)], np.int32),
        np.array([r.tokens for r in requests], np.int32),
        np.array([r.prompt_length for r in requests], np.int32),
    )
    assert lengths.requests == tuple(requests)
    assert lengths.any_are_ours(keeps) == bool(split_rows(requests, keeps).ours)


def test_missing_lengths_are_an_error_where_a_prompt_is_read() -> None:
    with pytest.raises(ServingError, match="did not hand over the lengths"):
        step_lengths(_metadata(rswa_prefix_lens=None))
    assert step_lengths(_metadata(rswa_prefix_lens=None, max_query_len=1)) is None


def test_a_device_s_lengths_are_waited_for_only_where_rows_may_stream() -> None:
    lengths = torch.empty(3, dtype=torch.int32, device="meta")
    assert step_lengths(_metadata(rswa_prefix_lens=lengths, max_query_len=1)) is None
    with pytest.raises(NotImplementedError):  # a meta tensor has no numbers to wait for
        step_lengths(_metadata(rswa_prefix_lens=lengths))


def test_a_step_that_warms_up_the_v2_runner_has_no_lengths_and_reads_no_prompt() -> None:
    """`InputBatch.make_dummy` of vLLM 0.26: several rows each, nobody's, before any request."""
    dummy = {"rswa_prefix_lens": None, "is_prefilling": torch.zeros(3, dtype=torch.bool)}
    assert step_lengths(_metadata(**dummy)) is None
    on_device = {"rswa_prefix_lens": torch.empty(3, dtype=torch.int32, device="meta")}
    assert step_lengths(_metadata(**(dummy | on_device))) is None  # guesses are checked
    dummy["is_prefilling"] = torch.tensor([False, True, False])
    with pytest.raises(ServingError, match="did not hand over the lengths"):
        step_lengths(_metadata(**dummy))
