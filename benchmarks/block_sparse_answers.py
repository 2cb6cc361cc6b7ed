"""What block-sparse layers cost in answers: SmolLM2 on one GPU, paired samples, random control.

    python -m benchmarks.block_sparse_answers FOLDER --output build/answers --parts retrieval,tasks

`retrieval`: among 4 keys (`benchmarks.four_keys`) at 8,000 tokens, 200 samples: dense, the plan's
triangle layers, these with its block-sparse layers (and at each of `--masses`), and with as many
random blocks in their place. `tasks`: all thirteen at 4,000 and 8,000 tokens, 40 samples each,
without the control. Each unit of samples is a line of `answers.jsonl`; the same command goes on
where an earlier one stopped (`--minutes`), and `report.json` is made of all lines of this plan.
Needs torch, transformers and tokenizers; the folder is a Hugging Face one
(`source_models.packed_smollm2` makes it on the machine).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any, Final

from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.evaluation.statistics import paired_difference, score_interval
from trianglemix.evaluation.task_list import all_tasks, pick_tasks
from trianglemix.exporter.layers.plan import Plan
from trianglemix.pytorch import TriangleMixConfig

from benchmarks import four_keys
from benchmarks.machine import describe_run
from benchmarks.paired_answers import Unit, Variant, Worker, ask, load

PLAN: Final = Path(__file__).resolve().parent.parent / "models" / "smollm2" / "plan.json"
LENGTHS: Final = (4000, 8000)
FIRST_SEED: Final = 7000  # no sample that the rule was tried on
BATCH: Final = 10
PARTS: Final = ("retrieval", "tasks")


def main() -> None:
    """Asks what is left to ask, within the minutes given, then sums up."""
    options = _parse()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "answers.jsonl"
    variants, started = _variants(options), time.time()
    lines = [line for line in _lines(file) if is_of(line, variants)]
    done = {line["unit"] for line in lines}
    units = [unit for unit in _units(options, variants) if unit.name not in done]
    print(f"{len(units)} units of samples to ask, {len(done)} were asked before", flush=True)
    deadline = started + 60 * options.minutes
    worker = Worker(options.folder, options.device, options.dtype, variants, deadline)
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(options.processes, len(units) or 1), load, (worker,)) as pool:
        for line in pool.imap_unordered(ask, units):
            if line is not None:
                line["choice"] = {name: choice_of(variants[name]) for name in line["variants"]}
                lines.append(line)
                with file.open("a", encoding="utf-8") as output:
                    output.write(json.dumps(line) + "\n")
                print(f"{time.time() - started:4.0f} s", _scores_of(line), flush=True)
        pool.close()
        pool.join()
    report = _report(options, variants, lines)
    (options.output / "report.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    left = len(units) + len(done) - len(lines)
    print(f"{left} units left: give the same command again" if left else "all was asked")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--masses", default="", help="more masses than the plan's, for retrieval")
    parser.add_argument("--samples", type=int, default=200, help="of retrieval")
    parser.add_argument("--task-samples", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=8000, help="of retrieval")
    parser.add_argument("--task-tokens", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--tasks", default=",".join(all_tasks()))
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    return parser.parse_args()


def _variants(options: argparse.Namespace) -> dict[str, Variant]:
    """The plan's section, or all other layers where it has none yet."""
    plan = Plan.load(options.plan)
    section, count = plan.block_sparse, plan.fingerprint.num_layers
    others = tuple(x for x in range(count) if x not in plan.triangle_layers)
    rule = section.rule if section else BlockRule(min_length=3500)
    triangle = TriangleMixConfig.from_pattern(
        plan.pattern or TrianglePattern(), plan.triangle_layers
    )
    sparse = replace(
        triangle,
        block_sparse_layer_indices=section.layers if section else others,
        block_rule=rule,
    )
    masses = [float(mass) for mass in options.masses.split(",") if mass]
    return {
        "dense": Variant(),
        "triangle": Variant(triangle),
        "block-sparse": Variant(sparse),
        "random blocks": Variant(sparse, random=True),
        **{
            f"block-sparse {mass:g}": Variant(replace(sparse, block_rule=replace(rule, mass=mass)))
            for mass in masses
        },
    }


def _units(options: argparse.Namespace, variants: dict[str, Variant]) -> Iterator[Unit]:
    parts, names = options.parts.split(","), tuple(variants)
    if "retrieval" in parts:
        kinds = list(four_keys.TASKS)
        for at, kind in enumerate(kinds):
            seeds = range(FIRST_SEED + at, FIRST_SEED + options.samples, len(kinds))
            yield from _batches("retrieval", kind, options.tokens, seeds, names)
    if "tasks" in parts:
        seeds = range(FIRST_SEED, FIRST_SEED + options.task_samples)
        for tokens in map(int, options.task_tokens.split(",")):
            for task in pick_tasks(options.tasks.split(",")):
                yield from _batches("tasks", task.name, tokens, seeds, names[:3])


def _batches(
    part: str, task: str, tokens: int, seeds: range, variants: tuple[str, ...]
) -> Iterator[Unit]:
    for begin in range(0, len(seeds), BATCH):
        yield Unit(part, task, tokens, tuple(seeds[begin : begin + BATCH]), variants)


def choice_of(variant: Variant) -> dict[str, Any] | None:
    """A variant's layers, pattern and rule as they stand in a line; None is dense."""
    if variant.config is None:
        return None
    content = asdict(variant.config) | {"random": variant.random}
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain


def is_of(line: dict[str, Any], variants: dict[str, Variant]) -> bool:
    """Whether a line was asked under these very variants: the plan may have changed since."""
    return bool(
        line.get("choice")
        == {name: choice_of(x) for name, x in variants.items() if name in line["variants"]}
    )


def _lines(file: Path) -> list[dict[str, Any]]:
    """What earlier runs asked; a line that was cut off is asked again."""
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    if len("".join(whole)) != len(text):
        file.write_text("".join(whole), encoding="utf-8")
    return [json.loads(line) for line in whole]


def _scores_of(line: dict[str, Any]) -> str:
    scores = {name: mean(answer["scores"]) for name, answer in line["answers"].items()}
    return line["unit"] + ": " + ", ".join(f"{name} {x:.2f}" for name, x in scores.items())


def _report(
    options: argparse.Namespace, variants: dict[str, Variant], lines: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """By part and task, and all tasks of a length together; printed as tables, too."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in sorted(lines, key=lambda line: str(line["unit"])):
        for task in ("all", line["task"]):
            groups.setdefault(f"{line['part']}, {line['tokens']}, {task}", []).append(line)
    figures = {name: _figures(group) for name, group in sorted(groups.items())}
    for name, rows in figures.items():
        print(f"{name} ({rows['samples']} samples)")
        for variant, row in rows["variants"].items():
            print(f"  {variant:20}", _row(row))
    configs = {name: choice_of(variant) for name, variant in variants.items()}
    run = describe_run(["torch", "transformers"])
    return {"run": run, "dtype": options.dtype, "variants": configs, "figures": figures}


def _figures(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Share right, differences of pairs from dense and from the triangle, density."""
    names = list(lines[0]["answers"])
    scores = {n: [x for line in lines for x in line["answers"][n]["scores"]] for n in names}
    rows = {}
    for name in names:
        densities = [share for line in lines for share in line["answers"][name]["density"].values()]
        rows[name] = {
            "right": asdict(score_interval(scores[name])),
            "against_dense": asdict(paired_difference(scores[name], scores["dense"])),
            "against_triangle": asdict(paired_difference(scores[name], scores["triangle"])),
            "density": mean(densities) if densities else None,
        }
    return {"samples": len(scores["dense"]), "variants": rows}


def _row(row: dict[str, Any]) -> str:
    parts = []
    for name in ("right", "against_dense", "against_triangle"):
        low, high = 100 * row[name]["low"], 100 * row[name]["high"]
        parts.append(f"{100 * row[name]['mean']:6.1f} ({low:.1f} to {high:.1f})")
    density = "" if row["density"] is None else f"density {row['density']:.3f}"
    return "  ".join((*parts, density))


if __name__ == "__main__":
    main()
