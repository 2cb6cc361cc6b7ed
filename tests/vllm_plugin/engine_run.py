"""One engine of vLLM, run in its own environment: a job as JSON in, what it answered as JSON out.

    python engine_run.py JOB RESULT

The job: `model`, `engine` (arguments of `LLM`), `register` (the plug-in, by hand) and `rounds`,
each `{"prompts": [[ids]], "tokens": n, "budget": tokens of a step, or null}`, with "adapters" where
prompts have some: a folder or null each. Prompts of a round are given at once. Each answer says at
which tokens of its prompt steps began.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

from trianglemix.vllm.counters import count_folder, read_counts


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The answers, the layers' implementations and what they counted."""
    from vllm import LLM

    if job.get("register"):  # where the package is only on the path there is no entry point
        import trianglemix.vllm

        trianglemix.vllm.register()
    llm = LLM(model=job["model"], **job["engine"])
    config = llm.llm_engine.vllm_config
    scheduler = getattr(getattr(llm.llm_engine.engine_core, "engine_core", None), "scheduler", None)
    preempted = _count_preemptions(scheduler)
    starts = _watch_starts(scheduler)
    rounds = [_answer(llm, scheduler, asked, starts) for asked in job["rounds"]]
    layers = config.compilation_config.static_forward_context
    counts = read_counts([count_folder(config.instance_id)])
    return {
        "rounds": rounds,
        "counts": {str(layer): rows for layer, rows in counts.items()},
        "layers": {name: type(layer.impl).__name__ for name, layer in layers.items()},
        "preempted": len(preempted),
    }


def _answer(
    llm: Any, scheduler: Any, asked: dict[str, Any], starts: dict[str, list[int]]
) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    if asked.get("budget") is not None:
        scheduler.max_num_scheduled_tokens = asked["budget"]
    sampling = SamplingParams(
        temperature=0, max_tokens=asked["tokens"], logprobs=1, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    answers = []
    loras = _loras(asked["adapters"]) if "adapters" in asked else None
    for output in llm.generate(prompts, sampling, use_tqdm=False, lora_request=loras):
        tokens = list(output.outputs[0].token_ids)
        steps = zip(output.outputs[0].logprobs, tokens, strict=True)
        logs = [step[token].logprob for step, token in steps]
        began = [start for start in starts.get(output.request_id, [])
                 if start < len(output.prompt_token_ids)]  # fmt: skip
        answer = {"tokens": tokens, "logs": logs, "cached": output.num_cached_tokens}
        answers.append(answer | {"starts": began})
    return answers


def _loras(folders: list[str | None]) -> list[Any]:
    from vllm.lora.request import LoRARequest

    numbers = {folder: 1 + zlib.crc32(folder.encode()) % 1000 for folder in folders if folder}
    return [folder and LoRARequest(folder, numbers[folder], folder) for folder in folders]


def _watch_starts(scheduler: Any) -> dict[str, list[int]]:
    """By request the number of its tokens before each of its steps, as they come."""
    starts: dict[str, list[int]] = {}
    if scheduler is not None:
        schedule = scheduler.schedule

        def watched(*arguments: Any, **named: Any) -> Any:
            step = schedule(*arguments, **named)
            for name, rows in step.num_scheduled_tokens.items():
                done = scheduler.requests[name].num_computed_tokens  # with this step's
                starts.setdefault(name.split("-")[0], []).append(done - rows)
            return step

        scheduler.schedule = watched
    return starts


def _count_preemptions(scheduler: Any) -> list[str]:
    seen: list[str] = []
    if scheduler is not None:
        preempt = scheduler._preempt_request

        def counted(request: Any, *arguments: Any, **named: Any) -> Any:
            seen.append(request.request_id)
            return preempt(request, *arguments, **named)

        scheduler._preempt_request = counted
    return seen


if __name__ == "__main__":
    done = run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(done), encoding="utf-8")
