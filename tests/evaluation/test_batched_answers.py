"""Answers that are written together are those that a model gives one by one."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from trianglemix.evaluation.huggingface import HuggingFaceModel, HuggingFaceOptions
from trianglemix.pytorch import BlockRule, TriangleMixConfig, patch, unpatch

from benchmarks.batched_answers import read_prompt, write_answers
from benchmarks.block_sparse_answers import choice_of, is_of
from benchmarks.paired_answers import Variant
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


def test_answers_of_another_plan_are_not_taken_up() -> None:
    variants = {"dense": Variant(), "block-sparse": Variant(CONFIG)}
    line = {"variants": list(variants)}
    line |= {"choice": {name: choice_of(variant) for name, variant in variants.items()}}
    line = json.loads(json.dumps(line))
    assert is_of(line, variants)
    assert is_of(line, {**variants, "more": Variant(CONFIG, random=True)})
    for other in (
        Variant(CONFIG, random=True),
        Variant(replace(CONFIG, block_sparse_layer_indices=[0])),
        Variant(replace(CONFIG, block_rule=BlockRule(mass=0.6, min_length=200))),
    ):
        assert not is_of(line, {**variants, "block-sparse": other})
    assert not is_of({"variants": list(variants)}, variants), "a line that does not say"
