"""Exports odd models by the thousand: each must be right, or refused; a summary at the end.

    python -m tests.odd.run --seeds 0-4999 --jobs 2 --results build/odd.jsonl

Results are added to the file line by line, with the commit they were seen at; what stands there for
this commit is not tried again, so that a run may be stopped and taken up, or spread over machines.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import onnxruntime

from tests.odd.odd_model import draw_model
from tests.odd.trial import Outcome, Trial, run_trial

ROOT: Final = Path(__file__).resolve().parents[2]
BAD: Final = (Outcome.WRONG, Outcome.CAUGHT, Outcome.CRASHED, Outcome.FALSE_ALARM)
_BATCH: Final = 400
_EXPORTED: Final = (Outcome.RIGHT.name, Outcome.NOT_RUN.name, Outcome.FALSE_ALARM.name)


def as_record(trial: Trial, commit: str) -> dict[str, Any]:
    """A line of the results file."""
    return {
        "commit": commit,
        "seed": trial.model.seed,
        "outcome": trial.outcome.name,
        "detail": trial.detail,
        "mask_is_carried": trial.model.mask_is_carried,
        "can_be_exported": trial.model.can_be_exported,
        "model": asdict(trial.model),
    }


def summary(records: Iterable[dict[str, Any]]) -> str:
    """Counts of outcomes, the share exported of what can be, and the refusals by their words."""
    records = list(records)
    counts = Counter(record["outcome"] for record in records)
    ran = [record for record in records if record["outcome"] != Outcome.NO_SOURCE.name]
    lines = [", ".join(f"{count} {Outcome[name].value}" for name, count in counts.most_common())]
    lines.append(f"{share_exported(records):.1%} exported of causal and sliding-window masks")
    refusals = Counter(
        record["detail"][:110]
        for record in ran
        if record["outcome"] == Outcome.REFUSED.name and record["can_be_exported"]
    )
    lines += [f"  {count} refused: {words}" for words, count in refusals.most_common(12)]
    return "\n".join(lines)


def share_exported(records: Iterable[dict[str, Any]]) -> float:
    """Of the models that run, and whose mask is causal or a sliding window in every layer."""
    due = [x for x in records if x["mask_is_carried"] and x["outcome"] != Outcome.NO_SOURCE.name]
    return sum(x["outcome"] in _EXPORTED for x in due) / max(1, len(due))


def main() -> int:
    """The exit code is 1 if anything is wrong, crashed, or a false alarm."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", default="0-299", help="FIRST-LAST")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "odd.jsonl")
    parser.add_argument("--commit", help="name of what is tested, where there is no repository")
    arguments = parser.parse_args()
    first, last = (int(number) for number in arguments.seeds.split("-"))
    commit = arguments.commit or _commit()
    done = _read(arguments.results, commit)
    seeds = [seed for seed in range(first, last + 1) if seed not in done]
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    with arguments.results.open("a", encoding="utf-8") as file:
        for trial in run_all(seeds, arguments.jobs):
            record = as_record(trial, commit)
            done[trial.model.seed] = record
            file.write(json.dumps(record) + "\n")
            file.flush()
            if trial.outcome in BAD:
                print(trial.model.seed, trial.outcome.value, trial.detail, flush=True)
    chosen = [record for seed, record in sorted(done.items()) if first <= seed <= last]
    print(f"{len(chosen)} odd models at {commit}:", summary(chosen))
    return int(any(Outcome[record["outcome"]] in BAD for record in chosen))


def _quiet() -> None:
    """In each process: what a source cannot do is no news."""
    onnxruntime.set_default_logger_severity(4)


def run_all(seeds: list[int], jobs: int) -> Iterator[Trial]:
    """As they end, in fresh processes: a fork of one that ran a session may hang in its threads.

    They are replaced now and then, since ONNX Runtime keeps some memory.
    """
    for start in range(0, len(seeds), _BATCH):
        with ProcessPoolExecutor(jobs, get_context("spawn"), _quiet) as pool:
            futures = {pool.submit(run_trial, seed): seed for seed in seeds[start : start + _BATCH]}
            for future in as_completed(futures):
                try:
                    yield future.result()
                except BrokenProcessPool as error:  # one of this batch ended its process
                    model = draw_model(futures[future])
                    yield Trial(model, Outcome.CRASHED, f"process: {error}")


def _read(path: Path, commit: str) -> dict[int, dict[str, Any]]:
    if not path.is_file():
        return {}
    records = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {record["seed"]: record for record in records if record["commit"] == commit}


def _commit() -> str:
    """The commit, marked where the tree holds changes that it does not."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
