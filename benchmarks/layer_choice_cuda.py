"""Does the choice of layers show? SmolLM2 on one GPU: gradients, then retrieval with three plans.

    python -m benchmarks.layer_choice_cuda FOLDER --output $OUT/layer_choice.json

Retrieval among 4 keys, every sample answered by the dense model, with the plan's 20 layers, and
with the first 15 layers as triangle layers. Samples are taken in turn, all three answers of one
before the next, so that stopping early (`--seconds`) leaves pairs. Needs torch, transformers and
tokenizers; the folder is a Hugging Face one (`benchmarks.packed_smollm2` makes it on the machine).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from trianglemix.analysis.check import Check, check_plan
from trianglemix.analysis.data import DataSettings, probe_samples
from trianglemix.analysis.gradients import probe
from trianglemix.analysis.select import importance_of, ranked_layers
from trianglemix.custom_ops.contract import TrianglePattern
from trianglemix.evaluation.huggingface import HuggingFaceModel, HuggingFaceOptions
from trianglemix.evaluation.model import encode_sample
from trianglemix.evaluation.prompts import Prompt, fitted_prompt
from trianglemix.evaluation.statistics import paired_difference, score_interval
from trianglemix.evaluation.task_list import all_tasks
from trianglemix.exporter.plan import Plan
from trianglemix.pytorch.backends import BACKENDS
from trianglemix.pytorch.blocks import Attention, block_attention
from trianglemix.pytorch.flex import flex_triangle
from trianglemix.pytorch.layout import Rows

PLAN: Final = Path(__file__).resolve().parent.parent / "models" / "smollm2" / "plan.json"
ANSWER_TOKENS: Final = 12  # a blank and seven digits, each a token of its own, with room
ALLOWED_LOSS: Final = 0.05


def main() -> None:
    """Runs everything within the time given, and writes one JSON file after each stage."""
    options = _parse()
    started = time.perf_counter()
    plan = Plan.load(PLAN)
    pattern = plan.pattern or TrianglePattern()
    settings = HuggingFaceOptions("cuda", "float32", (), pattern)
    model = HuggingFaceModel(options.folder, settings)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "pattern": pattern.as_attributes(),
        "dtype": "float32",
    }
    report["gradients"] = _gradients(model, pattern, options.probe_samples, options.probe_tokens)
    _write(report, options.output)
    BACKENDS["cuda"] = block_attention  # prompts of 200 lengths: nothing to compile again and again
    report["retrieval"] = _retrieval(model, plan, options, started)
    _write(report, options.output)
    report["flex_parity"] = _flex_parity(pattern)
    _write(report, options.output)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--probe-samples", type=int, default=48)
    parser.add_argument("--probe-tokens", type=int, default=2048)
    return parser.parse_args()


def _gradients(
    model: HuggingFaceModel, pattern: TrianglePattern, count: int, tokens: int
) -> dict[str, Any]:
    data = DataSettings(count, tokens)
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


def _retrieval(
    model: HuggingFaceModel, plan: Plan, options: argparse.Namespace, started: float
) -> dict[str, Any]:
    task = all_tasks()["niah_multikey_1"]
    plans: dict[str, tuple[int, ...]] = {
        "dense": (),
        "plan": plan.triangle_layers,
        "first 15": tuple(range(15)),
    }
    scores: dict[str, list[float]] = {name: [] for name in plans}
    answers: list[dict[str, Any]] = []
    for seed in range(options.samples):
        if time.perf_counter() - started > options.seconds:
            break
        prompt = fitted_prompt(
            task, seed, options.tokens, lambda s: encode_sample(model.tokenizer, s)
        )
        line: dict[str, Any] = {"seed": seed, "tokens": len(prompt.ids)}
        for name, layers in plans.items():
            text = _answer(model, layers, prompt)
            scores[name].append(task.score(text, prompt.sample))
            line[name] = text
        answers.append({**line, "right": prompt.sample.references[0]})
        if seed % 20 == 0:
            seconds = time.perf_counter() - started
            print(seed, {n: sum(s) for n, s in scores.items()}, f"{seconds:.0f} s", flush=True)
    result = {"task": task.name, "samples": len(answers), "plans": _figures(scores, plans)}
    result["checks"] = {
        name: asdict(_verdict(scores, plans, name)) for name in ("plan", "first 15")
    }
    print(json.dumps(result["plans"], indent=1))
    print({name: check["verdict"] for name, check in result["checks"].items()}, flush=True)
    return {**result, "answers": answers}


def _answer(model: HuggingFaceModel, layers: Sequence[int], prompt: Prompt) -> str:
    model.use_layers(layers)
    return model.answer(prompt.ids, ANSWER_TOKENS).text


def _figures(
    scores: dict[str, list[float]], plans: dict[str, tuple[int, ...]]
) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "layers": list(layers),
            "right": asdict(score_interval(scores[name])),
            "against_dense": asdict(paired_difference(scores[name], scores["dense"])),
        }
        for name, layers in plans.items()
    }


def _verdict(scores: dict[str, list[float]], plans: dict[str, tuple[int, ...]], name: str) -> Check:
    """What the tool's own check says of a plan; the first 15 layers stand for the control."""
    known = {frozenset(layers): scores[key] for key, layers in plans.items()}

    def score(layers: Sequence[int]) -> list[float]:
        return known.get(frozenset(layers), scores["first 15"])

    return check_plan([plans[name]], plans["first 15"], score, ALLOWED_LOSS)


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


def _write(report: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
