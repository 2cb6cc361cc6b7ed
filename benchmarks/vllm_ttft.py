"""How long until the first token inside vLLM? Stock, dense through the plug-in, with our layers.

    python -m benchmarks.vllm_ttft                      # one H100 or H200, Llama-3.1-8B's shape
    python -m benchmarks.vllm_ttft --ways stock,dense,triangle,block_sparse --page 128
    python -m benchmarks.vllm_ttft --decode             # 64 answers at 4K, too
    python -m benchmarks.vllm_ttft --decode --lengths ""    # these alone, beside what the file has
    python -m benchmarks.vllm_ttft --device cpu --lengths 500,1000 --layers 4 --rounds 2
    python -m benchmarks.vllm_ttft --report             # the table and the picture again

Two engines, each in a process of its own, share the card: vLLM alone (`VLLM_PLUGINS=none`) and
vLLM with the plug-in, which is switched between its ways. They take turns, one at a time, and
the order turns round after each round, so that a card that gets warm slows all alike. Medians.
`block_sparse` is `triangle` with block-sparse layers in the other half. Random weights have no
structure, so for each length `mass` is set for the density asked for, as
`benchmarks.prefill_block_sparse` does.
Pages of 128 tokens (`--page 128`; vLLM's default is 16) are read in place by block-sparse layers.
`--decode` needs the whole card for each engine: they start one after the other, twice.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from benchmarks.machine import RESULTS, describe_run, save_result
from benchmarks.vllm_engine import ENVIRONMENT, MARK, Settings

NAME: Final = "vllm_ttft"
WAYS: Final = ("stock", "dense", "triangle")
BLOCKS: Final = "block_sparse"
FIRST_MASS: Final = {8192: 0.02, 32768: 0.143, 65536: 0.162, 131072: 0.171}
"""Where the search for a density of .15 begins: what gave it in `prefill_block_sparse`."""
NEAR: Final = 0.005
TRIES: Final = 8
DECODE: Final = {"tokens": 4096, "requests": 64, "steps": 128}
_SPARE: Final = 128  # tokens of a model's length beyond the longest prompt
_PICTURE: Final = Path(__file__).resolve().parents[1] / "docs" / "images" / "vllm-ttft.png"


@dataclass
class Process:
    """An engine beside us; `begun` is what it says of itself."""

    child: subprocess.Popen[str]
    begun: dict[str, Any]

    def ask(self, question: dict[str, Any] | None = None) -> dict[str, Any]:
        """Its answer; without a question, the one it begins with. RuntimeError where it ended."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        if question is not None:
            self.child.stdin.write(json.dumps(question) + "\n")
            self.child.stdin.flush()
        for line in self.child.stdout:
            if line.startswith(MARK):
                answer: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return answer
            sys.stderr.write(line)
        raise RuntimeError(f"the engine ended with {self.child.wait()}; its log is above")


@contextmanager
def engine(settings: Settings) -> Iterator[Process]:
    """A running engine, warmed up by nothing yet; it ends with the block.

    It is up before this returns: an engine looks at the memory that the others left.
    """
    environment = os.environ | ENVIRONMENT
    if not settings.plugin:
        environment["VLLM_PLUGINS"] = "none"
    command = [sys.executable, "-m", "benchmarks.vllm_engine", json.dumps(asdict(settings))]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        process = Process(child, {})
        process.begun = process.ask()
        yield process
    finally:
        assert child.stdin is not None
        child.stdin.close()
        child.wait(timeout=120)


@dataclass(frozen=True)
class Asked:
    """What is measured: `ways` at `lengths` in tokens, so often; `density` is of `block_sparse`."""

    ways: list[str]
    lengths: list[int]
    rounds: int
    density: float
    stock_page: int | None = None


def measure_first_tokens(settings: Settings, asked: Asked, results: dict[str, Any]) -> None:
    """Fills `results["first_token"]` by length and way, and writes the file as they come."""
    found: dict[str, Any] = results.setdefault("first_token", {})
    alone = replace(settings, plugin=False, page=asked.stock_page)
    with engine(alone) as stock, engine(settings) as ours:
        results["engines"] = {"stock": stock.begun, "ours": ours.begun}
        for length in asked.lengths:
            given: dict[str, Any] = {"task": "first_token", "tokens": length}
            if BLOCKS in asked.ways:
                chosen = find_mass(ours, length, asked.density)
                results.setdefault("masses", {})[str(length)] = chosen
                given["mass"] = chosen["mass"]
            by_way: dict[str, list[dict[str, Any]]] = {way: [] for way in asked.ways}
            found[str(length)] = by_way
            for number in range(-1, asked.rounds):  # the first is to warm up
                for way in asked.ways if number % 2 else asked.ways[::-1]:
                    process = stock if way == "stock" else ours
                    answer = process.ask(given | {"way": way, "seed": number})
                    if number >= 0:
                        by_way[way].append(answer)
            save_result(NAME, results)
            print(_row(length, by_way), flush=True)


def find_mass(ours: Process, length: int, density: float) -> dict[str, float]:
    """The mass at which the block-sparse layers keep that share of the blocks, and the share.

    Raises:
        SystemExit: no mass within the tries gives it.
    """
    mass, low, high = FIRST_MASS.get(length, density), (0.0, 0.0), (1.0, 1.0)
    for number in range(TRIES):
        asked = {"task": "density", "way": BLOCKS, "mass": mass, "tokens": length, "seed": -1}
        found: float = ours.ask(asked)["density"]
        print(f"{length} tokens: mass {mass:.4f} gives {found:.4f}", file=sys.stderr, flush=True)
        if abs(found - density) <= NEAR:
            return {"mass": mass, "density": found}
        low, high = ((mass, found), high) if found < density else (low, (mass, found))
        share = (density - low[1]) / (high[1] - low[1]) if number % 2 == 0 else 0.5
        mass = low[0] + share * (high[0] - low[0])  # on the line between the two, or the middle
    raise SystemExit(f"no mass gives density {density} at {length} tokens")


def measure_decoding(settings: Settings, results: dict[str, Any]) -> None:
    """Fills `results["decode"]`: tokens per second by way, each engine started twice."""
    found: dict[str, list[float]] = results.setdefault("decode", {way: [] for way in WAYS})
    roomy = replace(settings, longest=DECODE["tokens"] + 2 * DECODE["steps"], memory=0.9,
                    requests=DECODE["requests"], compiled=True)  # fmt: skip
    for number, plugin in enumerate((False, True, True, False)):
        ways = WAYS[1:] if plugin else WAYS[:1]
        with engine(replace(roomy, plugin=plugin)) as process:
            for repeat in range(-1, 2):
                for way in ways:
                    asked = {"task": "decode", "way": way, "seed": 100 * number, **DECODE}
                    rate = process.ask(asked)["tokens_per_second"]
                    if repeat >= 0:
                        found[way].append(rate)
        save_result(NAME, results)
    rates = {way: statistics.median(rate) for way, rate in found.items()}
    shares = ", ".join(f"{way} {rate / rates['stock']:.3f}" for way, rate in rates.items())
    print(f"{DECODE}: stock {rates['stock']:.0f} tokens/s; shares {shares}")


def _row(length: int | str, by_way: dict[str, list[dict[str, Any]]]) -> str:
    """A line of the table: seconds of stock, shares of the others, whether answers are stock's."""
    seconds = {way: statistics.median(x["seconds"] for x in found) for way, found in by_way.items()}
    others = [way for way in by_way if way != "stock"]
    shares = " | ".join(f"{seconds[way] / seconds['stock']:.3f}" for way in others)
    same = all(
        one["token"] == other["token"] and one["log"] == other["log"]
        for one, other in zip(by_way["stock"], by_way["dense"], strict=True)
    )
    return f"| {length} | {seconds['stock']:.3f} | {shares} | {'yes' if same else 'no'} |"


def report(results: dict[str, Any]) -> None:
    """Prints the table, and draws the picture where matplotlib is."""
    ways = list(next(iter(results["first_token"].values())))
    names = [name.replace("_", "-") for name in ways if name != "stock"]
    print(f"| tokens | stock, seconds | {' | '.join(names)} | dense answers as stock |")
    print("|---" * (len(ways) + 2) + "|")
    for length, by_way in results["first_token"].items():
        print(_row(length, by_way))
    for length, chosen in results.get("masses", {}).items():
        print(f"{length} tokens: density {chosen['density']:.3f} at mass {chosen['mass']:.4f}")
    try:
        _draw(results["first_token"])
    except ModuleNotFoundError:
        print("no picture: matplotlib is not installed", file=sys.stderr)


def _draw(found: dict[str, Any]) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2))
    lengths = [int(length) for length in found]
    labels = {"dense": "the plug-in, dense", "triangle": "half the layers triangle",
              BLOCKS: "the others block-sparse"}  # fmt: skip
    for way in [way for way in next(iter(found.values())) if way != "stock"]:
        shares = []
        for by_way in found.values():
            median = {w: statistics.median(x["seconds"] for x in by_way[w]) for w in by_way}
            shares.append(median[way] / median["stock"])
        axes.plot(lengths, shares, marker="o", label=labels[way])
    axes.axhline(1, color="grey", linewidth=1, label="vLLM alone")
    axes.set(xscale="log", xlabel="tokens of the prompt", ylabel="time to first token, share",
             ylim=(0, 1.15), xticks=lengths)  # fmt: skip
    axes.set_xticklabels([f"{length // 1024}K" if length >= 1024 else str(length)
                          for length in lengths])  # fmt: skip
    axes.legend()
    figure.tight_layout()
    figure.savefig(_PICTURE, dpi=150)
    print(f"written: {_PICTURE}", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="8192,32768,131072")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"also {BLOCKS}")
    parser.add_argument("--density", type=float, default=0.15, help="of the block-sparse layers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--step", type=int, default=8192, help="tokens of a step")
    parser.add_argument("--memory", type=float, default=0.47, help="share of the card, each engine")
    parser.add_argument("--page", type=int, help="tokens of a page of the plug-in's engine")
    parser.add_argument("--stock-page", type=int, help="of vLLM's own")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compiled", action="store_true", help="torch.compile and graphs")
    parser.add_argument("--decode", action="store_true", help="64 answers at 4K, too")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--report", action="store_true", help="only table and picture")
    given = parser.parse_args()
    given.ways = given.ways.split(",")
    if not {"stock", "dense"} <= {*given.ways} <= {*WAYS, BLOCKS}:
        parser.error(f"--ways names stock, dense and any of triangle, {BLOCKS}")
    return given


def main() -> None:
    """Measures, writes benchmarks/results/vllm_ttft.json, prints the table."""
    given = _arguments()
    if given.report:
        report(json.loads((RESULTS / f"{NAME}.json").read_text(encoding="utf-8")))
        return
    lengths = [int(length) for length in given.lengths.split(",") if length]
    settings = Settings(
        plugin=True, layers=given.layers, longest=max(lengths, default=0) + _SPARE, step=given.step,
        memory=given.memory, requests=4, compiled=given.compiled,
        dtype="float32" if given.device == "cpu" else given.dtype, device=given.device,
        block_sparse=BLOCKS in given.ways, page=given.page,
    )  # fmt: skip
    results: dict[str, Any] = {"run": describe_run([]), "settings": asdict(settings)}
    if lengths:
        asked = Asked(given.ways, lengths, given.rounds, given.density, given.stock_page)
        measure_first_tokens(settings, asked, results)
    else:
        results = json.loads((RESULTS / f"{NAME}.json").read_text(encoding="utf-8"))
        results.pop("decode", None)
    if given.decode:
        measure_decoding(settings, results)
    report(results)


if __name__ == "__main__":
    main()
