"""One unit of samples, answered under several choices of layers by one process of a pool."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from trianglemix.analysis.random_blocks import RandomBlocks
from trianglemix.evaluation.huggingface import HuggingFaceModel, HuggingFaceOptions
from trianglemix.evaluation.model import encode_sample
from trianglemix.evaluation.prompts import Prompt, fitted_prompt
from trianglemix.evaluation.task import Task
from trianglemix.evaluation.task_list import all_tasks
from trianglemix.pytorch import TriangleMixConfig, patch, unpatch
from trianglemix.pytorch.backends import BACKENDS
from trianglemix.pytorch.block_sparse import SPAN_KERNELS, masked_span
from trianglemix.pytorch.blocks import block_attention
from trianglemix.pytorch.kept_shares import KeptShares

from benchmarks import four_keys
from benchmarks.batched_answers import read_prompt, write_answers

TASKS: Final = {**four_keys.TASKS, **all_tasks()}
RETRIEVAL_TOKENS: Final = 9  # of the answer: a blank, seven digits, each a token, and one more


@dataclass(frozen=True)
class Variant:
    """One way to run the model; without a configuration it is dense."""

    config: TriangleMixConfig | None = None
    random: bool = False


@dataclass(frozen=True)
class Unit:
    """Samples that one process asks under every variant: one line of the answers."""

    part: str
    task: str
    tokens: int
    seeds: tuple[int, ...]
    variants: tuple[str, ...]

    @property
    def name(self) -> str:
        """What an earlier run is asked for."""
        return f"{self.part}/{self.task}/{self.tokens}/{self.seeds[0]}-{self.seeds[-1]}"


@dataclass(frozen=True)
class Worker:
    """What each process of the pool loads, and when it takes no further unit (`time.time`)."""

    folder: Path
    device: str
    dtype: str
    variants: dict[str, Variant]
    deadline: float


_loaded: list[tuple[HuggingFaceModel, Worker]] = []  # of a process of the pool


def load(worker: Worker) -> None:
    """Once in each process."""
    torch.set_num_threads(1)
    BACKENDS["cuda"] = block_attention  # prompts of 200 lengths: nothing to compile
    SPAN_KERNELS["cuda"] = masked_span
    model = HuggingFaceModel(worker.folder, HuggingFaceOptions(worker.device, worker.dtype))
    _loaded.append((model, worker))


def ask(unit: Unit) -> dict[str, Any] | None:
    """One unit's answers; None once the time is over."""
    model, worker = _loaded[0]
    started = time.time()
    if started > worker.deadline:
        return None
    task = TASKS[unit.task]
    if unit.part == "retrieval":
        task = replace(task, max_new_tokens=RETRIEVAL_TOKENS)
    prompts = {
        seed: fitted_prompt(task, seed, unit.tokens, lambda s: encode_sample(model.tokenizer, s))
        for seed in unit.seeds
    }
    answers = {
        name: _answers(model, worker.variants[name], task, prompts) for name in unit.variants
    }
    facts = asdict(unit) | {"unit": unit.name, "lengths": [len(p.ids) for p in prompts.values()]}
    return facts | {"seconds": time.time() - started, "answers": answers}


def _answers(
    model: HuggingFaceModel, variant: Variant, task: Task, prompts: dict[int, Prompt]
) -> dict[str, Any]:
    """Scores and texts of the prompts, which are named by their seeds, and densities by layer."""
    density, read = KeptShares(), []
    with torch.inference_mode():
        if variant.config:
            patch(model.model, variant.config)
        for seed, prompt in prompts.items():
            with density.watching(RandomBlocks(seed) if variant.random else None):
                read.append(read_prompt(model.model, prompt.ids))
        if variant.config:
            unpatch(model.model)
        tokens = write_answers(model.model, read, task.max_new_tokens, model.stop_ids)
    texts = [model.tokenizer.decode(one) for one in tokens]
    scores = [task.score(text, p.sample) for text, p in zip(texts, prompts.values(), strict=True)]
    return {"scores": scores, "texts": texts, "density": density.by_layer()}
