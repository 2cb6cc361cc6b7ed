"""The tensors of a step: rows taken and put back, pages and keys of each segment."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.vllm.roles import Keeps
from trianglemix.vllm.row_split import Request, split_rows
from trianglemix.vllm.segments import segment_tensors

from tests.vllm_plugin.test_row_split import steps

KEEPS = st.sampled_from([TrianglePattern(3, 10, 6), BlockRule(0.5, 150, num_last_tokens=8)])


@given(steps(longest=400), KEEPS)
def test_parts_of_a_step_cover_it(requests: list[Request], keeps: Keeps) -> None:
    total = max((request.end for request in requests), default=0)
    table = torch.arange(len(requests) * 9, dtype=torch.int32).view(-1, 9)
    tokens = torch.tensor([request.tokens + 1000 for request in requests], dtype=torch.int32)
    x, output = torch.arange(total) * 3, torch.full((total,), -1)
    split = split_rows(requests, keeps)
    for segments in (split.ours, split.dense):
        if not segments:
            continue
        made = segment_tensors(segments, table, tokens)
        taken = made.rows.take(x)
        assert made.starts.tolist() == made.starts_cpu.tolist()
        assert made.starts[-1] == len(taken)
        for s, segment in enumerate(segments):
            rows = taken[made.starts[s] : made.starts[s + 1]]
            assert rows.tolist() == [3 * row for row in range(segment.begin, segment.end)]
            assert made.table[s].tolist() == table[segment.request].tolist()
            known = tokens[segment.request] if segment.is_newest else segment.keys
            assert made.keys[s] == known
        target = made.rows.target(output)
        target.copy_(taken)
        made.rows.put(output, target)
        assert made.longest_rows == max(segment.rows for segment in segments)
    assert output.tolist() == x.tolist()
