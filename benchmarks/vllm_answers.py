"""Does a served model answer as `patch()` does? SmolLM2's real weights, retrieval among 4 keys.

    python -m benchmarks.vllm_answers FOLDER              # one H100 or H200, 100 samples of 8,000
    python -m benchmarks.vllm_answers FOLDER --device cpu --samples 2 --tokens 1500 --python PYTHON
    python -m benchmarks.vllm_answers FOLDER --ways triangle,block-sparse,dense

Servers, vLLM with the plug-in (the triangle layers of the plan, or its block-sparse ones, too) and
vLLM alone, start beside this process, which meanwhile answers the same prompts with transformers,
patched and dense. All prompts go to a server over HTTP as token ids, one after the other, in steps
of `--step` tokens. Two programs that compute the same differ in their last digits, and so now and
then in a token: how often the two *dense* ones do is the measure for how often the others may.
FOLDER is a Hugging Face folder (`source_models.packed_smollm2` makes it where no index is).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.evaluation.endpoint import Endpoint
from trianglemix.evaluation.model import encode_sample
from trianglemix.evaluation.prompts import Prompt, fitted_prompt
from trianglemix.evaluation.served import ServedModel, choose_model
from trianglemix.evaluation.statistics import paired_difference, paired_ratio, score_interval
from trianglemix.evaluation.task import Task
from trianglemix.exporter.layers.plan import Plan
from trianglemix.pytorch import TriangleMixConfig
from trianglemix.runtime.tokenizer import Tokenizer
from trianglemix.vllm import additional_config

from benchmarks import four_keys
from benchmarks.machine import describe_run, save_result
from benchmarks.paired_answers import RETRIEVAL_TOKENS, Unit, Variant, Worker, ask, load
from benchmarks.vllm_engine import ENVIRONMENT
from benchmarks.vllm_server import Server

NAME: Final = "vllm_answers"
PLAN: Final = Path(__file__).resolve().parents[1] / "models" / "smollm2" / "plan.json"
WAYS: Final = ("triangle", "block-sparse", "dense")
FIRST_SEED: Final = 9000  # no sample that a plan was chosen by
BATCH: Final = 10
_SPARE: Final = 32
_START_SECONDS: Final = 240.0
_CARD: Final = {"kv-cache-memory-bytes": str(4 << 30), "gpu-memory-utilization": "0.2"}
"""A cache of a stated size: a server that measures what is left would count its neighbours."""
_PROCESSOR: Final = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def main() -> None:
    """Asks, writes benchmarks/results/vllm_answers.json, prints what is the same."""
    options, started = _parse(), time.time()
    plan = Plan.load(options.plan)
    ways = {way: _config(way, plan) for way in WAYS if way in options.ways.split(",")}
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {
            way: stack.enter_context(_server(way, config, plan, options, work))
            for way, config in ways.items()
        }
        units = _units(options, tuple(ways))
        patched = _answers_here(units, ways, options)
        print(f"{time.time() - started:.0f} s: transformers has answered", flush=True)
        served = {}
        for way, server in servers.items():
            address = server.address(_START_SECONDS)
            served[way] = _answers_of(f"{address}/v1", units, options)
            print(f"{time.time() - started:.0f} s: {way} was served", flush=True)
            _check_layers(way, served[way], ways[way])
    samples = _paired(units, patched, served)
    content = {
        "run": describe_run(["torch", "transformers"]) | {"vllm": _vllm_version()},
        "settings": {"tokens": options.tokens, "dtype": options.dtype, "step": options.step,
                     "ways": {way: config and asdict(config) for way, config in ways.items()}},
        "seconds": time.time() - started,
        "figures": _figures(samples, list(ways)),
        "samples": samples,
    }  # fmt: skip
    print(json.dumps(content["figures"], indent=1))
    if options.device == "cuda":
        print(f"written: {save_result(NAME, content)}", file=sys.stderr)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--ways", default="triangle,dense")
    parser.add_argument("--step", type=int, default=2048, help="tokens of a step of the server")
    parser.add_argument("--dtype", default=None, help="bfloat16, on a CPU float32")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--python", default=sys.executable, help="that has vLLM")
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    return options


def _config(way: str, plan: Plan) -> TriangleMixConfig | None:
    """What is patched, and what the plug-in is told."""
    if way == "dense":
        return None
    config = TriangleMixConfig.from_pattern(plan.pattern or TrianglePattern(), plan.triangle_layers)
    if way == "triangle":
        return config
    if plan.block_sparse is None:
        raise SystemExit("the plan has no block-sparse layers")
    section = plan.block_sparse
    return replace(config, block_sparse_layer_indices=section.layers, block_rule=section.rule)


def _server(
    way: str,
    config: TriangleMixConfig | None,
    plan: Plan,
    options: argparse.Namespace,
    work: Path,
) -> Server:
    given: dict[str, str | None] = {
        "model": str(options.folder.resolve()), "served-model-name": way, "dtype": options.dtype,
        "max-model-len": str(options.tokens + _SPARE), "max-num-batched-tokens": str(options.step),
        "max-num-seqs": "8", "enforce-eager": None,
    }  # fmt: skip
    environment = dict(ENVIRONMENT)
    if options.device == "cuda":
        given |= _CARD
    else:
        environment |= _PROCESSOR
    if config is None:
        environment["VLLM_PLUGINS"] = "none"
    else:
        section = additional_config(config, plan.fingerprint.num_layers)
        given["additional-config"] = json.dumps(section)
    return Server(options.python, given, environment, work / f"{way}.log")


def _units(options: argparse.Namespace, ways: tuple[str, ...]) -> list[Unit]:
    """Half of the samples from each kind of text."""
    kinds, units = list(four_keys.TASKS), []
    for at, kind in enumerate(kinds):
        seeds = range(FIRST_SEED + at, FIRST_SEED + options.samples, len(kinds))
        for begin in range(0, len(seeds), BATCH):
            chosen = tuple(seeds[begin : begin + BATCH])
            units.append(Unit("retrieval", kind, options.tokens, chosen, ways))
    return units


def _answers_here(
    units: Sequence[Unit],
    ways: dict[str, TriangleMixConfig | None],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Of each unit what `benchmarks.paired_answers` gives: scores and texts by way."""
    variants = {way: Variant(config) for way, config in ways.items()}
    load(Worker(options.folder, options.device, options.dtype, variants, float("inf")))
    found = [ask(unit) for unit in units]
    return [answers for answers in found if answers is not None]


def _answers_of(address: str, units: Sequence[Unit], options: argparse.Namespace) -> dict[str, Any]:
    """Texts, scores and seconds of a server, sample by sample, and the layers that it counted."""
    tokenizer = Tokenizer.from_folder(options.folder)
    assert tokenizer is not None
    endpoint = Endpoint(address, timeout=120)
    model = ServedModel(endpoint, choose_model(endpoint, None, "--model"), tokenizer)
    texts, scores, seconds = [], [], []
    for unit in units:
        for task, prompt in _prompts(unit, tokenizer):
            answer = model.answer(prompt.ids, RETRIEVAL_TOKENS)
            texts.append(answer.text)
            scores.append(task.score(answer.text, prompt.sample))
            seconds.append(answer.ttft_s)
    return {"texts": texts, "scores": scores, "seconds": seconds, **model.facts}


def _prompts(unit: Unit, tokenizer: Tokenizer) -> list[tuple[Task, Prompt]]:
    """As `benchmarks.paired_answers` makes them."""
    task = replace(four_keys.TASKS[unit.task], max_new_tokens=RETRIEVAL_TOKENS)

    def made(seed: int) -> Prompt:
        return fitted_prompt(task, seed, unit.tokens, lambda s: encode_sample(tokenizer, s))

    return [(task, made(seed)) for seed in unit.seeds]


def _check_layers(way: str, served: dict[str, Any], config: TriangleMixConfig | None) -> None:
    wanted = [sorted(config.triangle_layer_indices or ()) if config else [],
              sorted(config.block_sparse_layer_indices or ()) if config else []]  # fmt: skip
    found = [served["triangle_layers"], served["block_sparse_layers"]]
    if found != wanted:
        raise SystemExit(
            f"the {way} server has triangle and block-sparse layers {found}, not {wanted}: is the "
            "plug-in's entry point installed?"
        )


def _paired(
    units: Sequence[Unit], patched: Sequence[dict[str, Any]], served: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    samples: list[dict[str, Any]] = []
    for unit, here in zip(units, patched, strict=True):
        for place, seed in enumerate(unit.seeds):
            at, answers = len(samples), {}
            for way, there in served.items():
                kept = here["answers"][way]
                answers[f"patch {way}"] = {"text": kept["texts"][place],
                                           "score": kept["scores"][place]}  # fmt: skip
                answers[f"vllm {way}"] = {
                    "text": there["texts"][at], "score": there["scores"][at],
                    "first_token_s": there["seconds"][at],
                }  # fmt: skip
            tokens = here["lengths"][place]
            samples.append({"task": unit.task, "seed": seed, "tokens": tokens, "answers": answers})
    return samples


def _figures(samples: Sequence[dict[str, Any]], ways: Sequence[str]) -> dict[str, Any]:
    """How many answers are the same, how many are right, first tokens of the servers."""

    def column(name: str, what: str) -> list[Any]:
        return [sample["answers"][name][what] for sample in samples]

    figures: dict[str, Any] = {"samples": len(samples)}
    for way in ways:
        ours, theirs = f"vllm {way}", f"patch {way}"
        same = [a == b for a, b in zip(column(ours, "text"), column(theirs, "text"), strict=True)]
        verdict = zip(column(ours, "score"), column(theirs, "score"), strict=True)
        figures[way] = {
            "same_answers": sum(same),
            "same_verdict": sum(a == b for a, b in verdict),
            "right_served": asdict(score_interval(column(ours, "score"))),
            "right_patched": fmean(column(theirs, "score")),
            "difference": asdict(paired_difference(column(ours, "score"), column(theirs, "score"))),
        }
        if way != "dense" and "dense" in ways:
            first = [column(f"vllm {name}", "first_token_s") for name in (way, "dense")]
            figures[way]["first_token_ratio"] = asdict(paired_ratio(*first))
            texts = zip(column(theirs, "text"), column("patch dense", "text"), strict=True)
            figures[way]["differ_from_dense"] = sum(a != b for a, b in texts)
    return figures


def _vllm_version() -> str | None:
    try:
        return version("vllm")
    except PackageNotFoundError:  # it is in another environment (--python)
        return None


if __name__ == "__main__":
    main()
