"""Does the choice of layers show? SmolLM2 on one GPU: gradients, then retrieval with three plans.

    python -m benchmarks.layer_choice_cuda FOLDER --output layer_choice.json

Retrieval among 4 keys (`benchmarks.four_keys`), every sample answered by the dense model, with the
plan's 20 layers, and with the first 15 layers as triangle layers. Several processes share the GPU:
answering in PyTorch waits for the processor. Needs torch, transformers and tokenizers; the folder
is a Hugging Face one (`source_models.packed_smollm2` makes it on the machine).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from trianglemix.analysis.check import Check, check_plan
from trianglemix.analysis.data import DataSettings, probe_samples
from trianglemix.analysis.gradients import probe
from trianglemix.analysis.select import importance_of, ranked_layers
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.evaluation.huggingface import HuggingFaceModel, HuggingFaceOptions
from trianglemix.evaluation.model import encode_sample
from trianglemix.evaluation.prompts import fitted_prompt
from trianglemix.evaluation.statistics import paired_difference, score_interval
from trianglemix.exporter.layers.plan import Plan
from trianglemix.pytorch.backends import BACKENDS
from trianglemix.pytorch.blocks import Attention, block_attention
from trianglemix.pytorch.flex import flex_triangle
from trianglemix.pytorch.layout import Rows

from benchmarks.four_keys import TASKS
from benchmarks.machine import describe_run

PLAN: Final = Path(__file__).resolve().parent.parent / "models" / "smollm2" / "plan.json"
PLANS: Final[dict[str, tuple[int, ...]]] = {
    "dense": (),
    "plan": Plan.load(PLAN).triangle_layers,
    "first 15": tuple(range(15)),
}
ANSWER_TOKENS: Final = 9  # a blank and seven digits, each a token of its own, and one more
ALLOWED_LOSS: Final = 0.05
FIRST_SEED: Final = 1000  # no sample that wordings were tried on
PARTS: Final = ("gradients", "retrieval", "flex")


def main() -> None:
    """Runs the parts asked for, and writes one JSON file after each."""
    options = _parse()
    pattern = TrianglePattern()
    report: dict[str, Any] = {
        "run": describe_run(["torch", "transformers"]),
        "pattern": pattern.as_attributes(),
    }
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "gradients": lambda: _gradients(options, pattern),
        "retrieval": lambda: _retrieval(options),
        "flex": lambda: _flex_parity(pattern),
    }
    for name in options.parts.split(","):
        report[name] = parts[name]()
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--probe-samples", type=int, default=48)
    parser.add_argument("--probe-tokens", type=int, default=2048)
    return parser.parse_args()


def _model(folder: Path, dtype: str) -> HuggingFaceModel:
    return HuggingFaceModel(folder, HuggingFaceOptions("cuda", dtype))


def _gradients(options: argparse.Namespace, pattern: TrianglePattern) -> dict[str, Any]:
    model = _model(options.folder, "float32")
    data = DataSettings(options.probe_samples, options.probe_tokens)
    started = time.perf_counter()
    done = [
        probe(model.model, sample, pattern, chunk=512)
        for sample in probe_samples(model.tokenizer, data)
    ]
    importance = importance_of(done)
    middle = importance.middle
    result = {
        "data": data.description,
        "seconds": time.perf_counter() - started,
        "peak_memory_mb": torch.cuda.max_memory_allocated() / 2**20,
        "mean": importance.mean.tolist(),
        "mean_abs": importance.mean_abs.tolist(),
        "first_ten_over_last_eight": float(middle[:10].mean() / middle[-8:].mean()),
        "rank_correlation_of_halves": importance.half_correlation,
        "least_important_first": list(ranked_layers(importance, range(len(middle)))),
    }
    print({k: v for k, v in result.items() if not k.startswith("mean")}, flush=True)
    return result


def _retrieval(options: argparse.Namespace) -> dict[str, Any]:
    """Samples are dealt to the processes one by one, all three answers of one to the same."""
    context = multiprocessing.get_context("spawn")
    seeds = range(FIRST_SEED, FIRST_SEED + options.samples)
    started = time.perf_counter()
    with context.Pool(options.processes, _load, (options.folder, options.tokens)) as pool:
        answers = pool.map(_answer, seeds, chunksize=1)
    result: dict[str, Any] = {
        "tokens": options.tokens,
        "dtype": "bfloat16",
        "seconds": time.perf_counter() - started,
    }
    for name in ("all", *TASKS):
        rows = [answer for answer in answers if name in ("all", answer["task"])]
        scores = {plan: [float(row[plan]["score"]) for row in rows] for plan in PLANS}
        checks = {plan: asdict(_verdict(scores, plan)) for plan in ("plan", "first 15")}
        result[name] = {"samples": len(rows), "plans": _figures(scores), "checks": checks}
        verdicts = {plan: check["verdict"] for plan, check in checks.items()}
        print(name, json.dumps(result[name]["plans"], indent=1), verdicts, flush=True)
    return {**result, "answers": answers}


_loaded: list[tuple[HuggingFaceModel, int]] = []  # of a process of the pool


def _load(folder: Path, tokens: int) -> None:
    torch.set_num_threads(1)
    BACKENDS["cuda"] = block_attention  # prompts of 200 lengths: nothing to compile
    _loaded.append((_model(folder, "bfloat16"), tokens))


def _answer(seed: int) -> dict[str, Any]:
    """One sample, answered under each plan."""
    model, tokens = _loaded[0]
    task = list(TASKS.values())[seed % len(TASKS)]
    prompt = fitted_prompt(task, seed, tokens, lambda s: encode_sample(model.tokenizer, s))
    line: dict[str, Any] = {"seed": seed, "task": task.name, "tokens": len(prompt.ids)}
    for name, layers in PLANS.items():
        model.use_layers(layers)
        text = model.answer(prompt.ids, ANSWER_TOKENS).text
        line[name] = {"text": text, "score": task.score(text, prompt.sample)}
    return {**line, "right": prompt.sample.references[0]}


def _figures(scores: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "right": asdict(score_interval(scores[name])),
            "against_dense": asdict(paired_difference(scores[name], scores["dense"])),
        }
        for name in PLANS
    }


def _verdict(scores: dict[str, list[float]], name: str) -> Check:
    """What the tool's own check says of a plan; the first 15 layers stand for the control."""
    known = {frozenset(layers): scores[key] for key, layers in PLANS.items()}

    def score(layers: Sequence[int]) -> list[float]:
        return known.get(frozenset(layers), scores["first 15"])

    return check_plan([PLANS[name]], PLANS["first 15"], score, ALLOWED_LOSS)


def _flex_parity(pattern: TrianglePattern) -> dict[str, Any]:
    """Compiled flex_attention beside the blocks, at lengths that do not repeat."""
    result: dict[str, Any] = {}
    for length in (1024, 4000, 5000, 8000, 8100):
        q = torch.randn(1, 8, length, 64, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(1, 2, length, 64, device="cuda", dtype=torch.bfloat16) for _ in "kv")
        rows, attention = Rows(0, (0,), (length,)), Attention(pattern, 0.125)
        expected = block_attention(q.float(), k.float(), v.float(), rows, attention)
        torch.cuda.synchronize()
        started = time.perf_counter()
        error = (flex_triangle(q, k, v, rows, attention) - expected).abs().max().item()
        result[str(length)] = {"max_error": error, "first_call_s": time.perf_counter() - started}
        print("flex", length, result[str(length)], flush=True)
    return result


if __name__ == "__main__":
    main()
