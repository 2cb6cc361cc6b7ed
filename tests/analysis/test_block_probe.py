"""The probe of block-sparse layers equals figures made with the operator's reference."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from trianglemix.analysis.block_probe import BlockProbe
from trianglemix.analysis.block_shares import BlockFigures
from trianglemix.custom_ops.block_sparse.contract import TILE, BlockRule
from trianglemix.custom_ops.block_sparse.rule import Rows, block_sums, forced_blocks, kept_blocks
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.pytorch import TriangleMixConfig, choosing_blocks, patch, unpatch
from trianglemix.pytorch.block_choice import BlockSparse, dense_blocks
from trianglemix.pytorch.layout import Rows as CallRows

from tests.tiny_models import tiny_folder

MASSES = (0.5, 0.9)
N = 1100
PROBE = BlockProbe(TrianglePattern(4, 24, 8), (2,), (0, 1), MASSES)


@lru_cache(maxsize=1)
def _model() -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama")).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name:
                weight.mul_(6)
    return model


def _ids() -> list[int]:
    random = torch.Generator().manual_seed(4)
    ids: list[int] = torch.randint(3, 250, (N,), generator=random).tolist()
    return ids


def _queries_and_keys() -> dict[int, tuple[Tensor, Tensor, float]]:
    """Of the layers that are looked at, with all of them dense."""
    found: dict[int, tuple[Tensor, Tensor, float]] = {}

    def keep(layer: int, q: Tensor, k: Tensor, rows: CallRows, attention: BlockSparse) -> Tensor:
        found[layer] = q[0], k[0], attention.scale
        return dense_blocks(q, k, rows)

    config = replace(
        TriangleMixConfig.from_pattern(PROBE.pattern, PROBE.triangle_layers),
        block_sparse_layer_indices=PROBE.layers,
        block_rule=BlockRule(mass=0.9, min_length=0),
    )
    model = patch(copy.deepcopy(_model()), config)
    with torch.no_grad(), choosing_blocks(keep):
        model(torch.tensor([_ids()]))
    return found


def _figures(q: np.ndarray, k: np.ndarray, mass: float) -> BlockFigures:
    """By float64 probabilities of every row; `q` (scaled) and `k` are `[H, N, D]`."""
    rule, rows = BlockRule(mass=mass, min_length=0), Rows(0, 0, N, N)
    kept_pairs, recalls = np.zeros(2), []
    causal = np.tri(N, dtype=bool)
    for queries, keys in zip(q, k, strict=True):
        scores = np.where(causal, queries @ keys.T, -np.inf)
        shares = np.exp(scores - scores.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        of_head = []
        for tile in range(rows.num_tiles):
            if rows.is_dense(tile, rule):
                kept_pairs += tile + 1
                continue
            every = shares[TILE * tile : TILE * (tile + 1), : TILE * (tile + 1)]
            whole, looked_at = (block_sums(x, 0, tile + 1) for x in (every, every[15::16]))
            kept, exact = (kept_blocks(x, tile, rule) for x in (looked_at, whole))
            kept_pairs += kept.sum(), exact.sum()
            if not forced_blocks(tile, rule).all():
                of_head.append(whole[kept].sum() / whole.sum())
        recalls.append(of_head)
    pairs = len(q) * rows.num_tiles * (rows.num_tiles + 1) / 2
    density, exact_density = kept_pairs / pairs
    table = np.array(recalls)
    low = np.quantile(table, 0.05)
    return BlockFigures(density, exact_density, table.mean(), low, table.mean(1).min())


def test_the_probe_measures_what_the_rule_keeps() -> None:
    model = _model()
    sample = PROBE(model, _ids(), 1234)
    assert sample.tokens == 1234
    assert not hasattr(model.config, "trianglemix"), "the model is given back as it was"
    for values, (q, k, scale) in zip(sample.values, _queries_and_keys().values(), strict=True):
        queries = q.double().numpy() * scale
        keys = k.double().repeat_interleave(q.shape[0] // k.shape[0], 0).numpy()
        for got, mass in zip(values, MASSES, strict=True):
            ours, want = BlockFigures(*got), _figures(queries, keys, mass)
            for name in ("density", "exact", "recall", "low", "worst"):
                assert getattr(ours, name) == pytest.approx(getattr(want, name), abs=0.01), name
    low, high = sample.values[0]
    assert low[0] < high[0] < 1, "a smaller mass keeps less"
    unpatched = unpatch(patch(model, TriangleMixConfig(triangle_layer_indices=[1])))
    assert unpatched is model


def test_a_mass_of_one_is_measured_like_any_other() -> None:
    sample = replace(PROBE, masses=(0.9, 1.0))(copy.deepcopy(_model()), _ids(), N)
    for at_less, at_one in sample.values:
        assert at_one[2] == pytest.approx(1), "recall"
        assert at_less[0] < at_one[0] <= 1, "density"
