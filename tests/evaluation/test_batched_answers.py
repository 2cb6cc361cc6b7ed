"""Answers that are written together are those that a model gives one by one."""

from __future__ import annotations

import torch
from trianglemix.evaluation.huggingface import HuggingFaceModel, HuggingFaceOptions
from trianglemix.pytorch import BlockRule, TriangleMixConfig, patch, unpatch

from benchmarks.batched_answers import read_prompt, write_answers
from tests.tiny_models import tiny_folder

CONFIG = TriangleMixConfig(
    4, 24, 8, triangle_layer_indices=[2], block_sparse_layer_indices=[0, 1],
    block_rule=BlockRule(mass=0.5, min_length=200),
)  # fmt: skip
TOKENS = 12


def test_a_batch_of_caches_answers_as_its_prompts_alone() -> None:
    model = HuggingFaceModel(tiny_folder("llama"), HuggingFaceOptions())
    random = torch.Generator().manual_seed(2)
    prompts = [
        tuple(torch.randint(3, 250, (length,), generator=random).tolist())
        for length in (600, 431, 77)
    ]
    patch(model.model, CONFIG)
    expected = [model.answer(ids, TOKENS).text for ids in prompts]
    with torch.inference_mode():
        read = [read_prompt(model.model, ids) for ids in prompts]
        unpatch(model.model)
        together = write_answers(model.model, read, TOKENS, model.stop_ids)
        assert [model.tokenizer.decode(tokens) for tokens in together] == expected
        stop = together[1][3]
        cut = write_answers(model.model, read, TOKENS, frozenset([stop]))
    for short, whole in zip(cut, together, strict=True):
        end = whole.index(stop) if stop in whole else len(whole)
        assert short == whole[:end]
