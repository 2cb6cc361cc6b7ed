"""First tokens of many who ask at once: vLLM alone and with triangle layers under a mixed load.

    python -m benchmarks.vllm_load --only stock       # measures vLLM's capacity first
    python -m benchmarks.vllm_load --only triangle    # the same arrivals, the same rate
    python -m benchmarks.vllm_load --report

Requests arrive at random (Poisson, seeded) at 0.7 of what vLLM alone can bear, with prompts of 1K
to 64K tokens (uniform in their logarithm) and 200 tokens of answer. Each engine has the whole card,
so they run one after the other; `--only` runs one, and keeps what the file has of the others.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from dataclasses import asdict, replace
from typing import Any, Final

import numpy as np

from benchmarks.machine import RESULTS, describe_run, save_result
from benchmarks.vllm_engine import Settings
from benchmarks.vllm_ttft import WAYS, Process, engine

NAME: Final = "vllm_load"
SHARE: Final = 0.7
_SEED: Final = 20261128
_SPARE: Final = 512


def lengths(count: int, shortest: int, longest: int) -> list[int]:
    """Tokens of the prompts, uniform in their logarithm, seeded."""
    numbers = random.Random(_SEED)
    low, high = math.log(shortest), math.log(longest)
    return [round(math.exp(numbers.uniform(low, high))) for _ in range(count)]


def arrivals(tokens: list[int], rate: float) -> list[list[float]]:
    """`[second, tokens, seed]` of requests that come at `rate` a second, at random times."""
    numbers, second, found = random.Random(_SEED + 1), 0.0, []
    for seed, count in enumerate(tokens):
        second += numbers.expovariate(rate)
        found.append([second, count, seed])
    return found


def capacity(process: Process, tokens: list[int], steps: int) -> float:
    """Requests a second that an engine bears: all of a quarter of them at once."""
    some = tokens[: max(1, len(tokens) // 4)]
    asked = [[0.0, count, 1000 + seed] for seed, count in enumerate(some)]
    question = {"task": "load", "way": "stock", "arrivals": asked, "steps": steps}
    seconds: float = process.ask(question)["seconds"]
    return len(some) / seconds


def measure(way: str, settings: Settings, given: argparse.Namespace, results: Any) -> None:
    """Runs one way, and writes what the results have then."""
    tokens = lengths(given.requests, given.shortest, given.longest)
    with engine(replace(settings, plugin=way != "stock")) as process:
        warm = {"task": "first_token", "way": way, "tokens": given.longest, "seed": 9}
        process.ask(warm)
        if way == "stock":
            results["capacity"] = capacity(process, tokens, given.steps)
        coming = arrivals(tokens, SHARE * results["capacity"])
        asked = {"task": "load", "way": way, "arrivals": coming, "steps": given.steps}
        results[way] = {"run": describe_run([]), "engine": process.begun, **process.ask(asked)}
    save_result(NAME, results)


def report(results: Any) -> None:
    """The table: mean and 99th percentile of the seconds until the first token."""
    print(f"| at {SHARE * results['capacity']:.2f} requests/s | mean, s | 99th percentile, s |")
    print("|---|---|---|")
    for way in WAYS:
        if way in results:
            first = np.array(results[way]["first"])
            print(f"| {way} | {first.mean():.2f} | {np.percentile(first, 99):.2f} |")


def main() -> None:
    """Measures, writes benchmarks/results/vllm_load.json, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=WAYS, help="one way; else stock, triangle")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--steps", type=int, default=200, help="tokens of an answer")
    parser.add_argument("--shortest", type=int, default=1024)
    parser.add_argument("--longest", type=int, default=65536)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not given.report:
        settings = Settings(
            plugin=True, layers=given.layers, longest=given.longest + given.steps + _SPARE,
            step=8192 if given.device == "cuda" else 512, memory=0.9, requests=64,
            compiled=given.device == "cuda", device=given.device,
            dtype="bfloat16" if given.device == "cuda" else "float32",
        )  # fmt: skip
        results["settings"] = asdict(settings) | {"requests": given.requests}
        for way in [given.only] if given.only else ["stock", "triangle"]:
            measure(way, settings, given, results)
    report(results)


if __name__ == "__main__":
    main()
