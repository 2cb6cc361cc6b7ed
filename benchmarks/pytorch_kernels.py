"""The CUDA kernels from PyTorch beside compiled flex_attention: right, faster, cheap to call?

    python -m benchmarks.pytorch_kernels --output pytorch_kernels.json

First random calls through `torch.ops.trianglemix` against float64 (ragged, padded, chunked, decode,
dense, capped; block-sparse over the kernel's own choice of blocks). Then, in turns on one card,
median milliseconds on the device of calls as a patched model makes them (B=1, H=32, G=8, D=128 but
where said), microseconds that a call keeps the host busy, and the prefill of a patched model of
SmolLM2's shape, or with `--model FOLDER` of that model. Needs torch with CUDA and the library in
the package; the last part transformers, too.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from trianglemix.custom_ops.triangle.contract import DENSE_PATTERN, TrianglePattern
from trianglemix.pytorch import TriangleMixConfig, backends, patch
from trianglemix.pytorch.backends import triangle_attention
from trianglemix.pytorch.blocks import Attention
from trianglemix.pytorch.cuda_backend import (
    device_lengths,
    kernel_triangle,
    why_not_device,
)
from trianglemix.pytorch.cuda_call import Inputs, run_kernels
from trianglemix.pytorch.layout import Rows
from trianglemix.pytorch.operators import attend_triangle

from benchmarks.block_sparse_calls import NAMES, BlockCall
from benchmarks.block_sparse_calls import random_call as random_block_call
from benchmarks.device_time import event_time, kernel_times
from benchmarks.kernel_versions import Call
from benchmarks.kernel_versions import random_call as random_triangle_call
from benchmarks.machine import describe_run
from tests.custom_ops.tolerances import TOLERANCES

HEAD_SIZES: Final = (64, 128, 256, 96, 80)
PARTS: Final = ("check", "attention", "host", "prefill")


@dataclass(frozen=True)
class Shape:
    """New tokens on `keys` keys of each row; `pads` rows of the batch begin later."""

    new: int
    keys: int
    batch: int = 1
    pads: bool = False
    later: int = 0
    """Tokens of the prompt that come in later chunks."""
    dtype: torch.dtype = torch.bfloat16
    dense: bool = False

    def rows(self) -> Rows:
        """Every second row padded on the left, where the batch is padded."""
        first = tuple(self.keys // 3 * (b % 2) if self.pads else 0 for b in range(self.batch))
        return Rows(self.keys - self.new, first, (self.keys + self.later,) * self.batch)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Unit-normal; queries lie as projections leave them, keys as caches do."""
        q = torch.randn(self.batch, self.new, 32, 128, device="cuda").to(self.dtype)
        k, v = (torch.randn(self.batch, 8, self.keys, 128, device="cuda") for _ in range(2))
        return q.transpose(1, 2), k.to(self.dtype), v.to(self.dtype)

    def attention(self) -> Attention:
        """The pattern of the published figures, or the dense mode."""
        return Attention(DENSE_PATTERN if self.dense else TrianglePattern(), 128**-0.5)


SHAPES: Final = {
    "prompt 256": Shape(256, 256),
    "prompt 1K": Shape(1024, 1024),
    "prompt 8K": Shape(8192, 8192),
    "prompt 32K": Shape(32768, 32768),
    "prompt 128K": Shape(131072, 131072),
    "chunk 2K at 32K": Shape(2048, 32768, later=32768),
    "chunk 8K at 128K": Shape(8192, 131072, later=8192),
    "4 x 8K, padded": Shape(8192, 8192, 4, pads=True),
    "dense prompt 1K": Shape(1024, 1024, dense=True),
    "dense prompt 8K": Shape(8192, 8192, dense=True),
    "dense prompt 32K": Shape(32768, 32768, dense=True),
    "dense chunk 2K at 32K": Shape(2048, 32768, dense=True),
    "decode 2K": Shape(1, 2048, dense=True),
    "decode 32K": Shape(1, 32768, dense=True),
    "decode 128K": Shape(1, 131072, dense=True),
    "decode 8 x 4K, padded": Shape(1, 4096, 8, pads=True, dense=True),
    "float32 prompt 8K": Shape(8192, 8192, dtype=torch.float32),
}


def check(count: int, seed: int) -> dict[str, Any]:
    """`count` random calls of each head size and operator.

    Raises:
        SystemExit: one is further off than rounding explains, or wrote to the cache.
    """
    worst = dict[str, float]()
    for D in HEAD_SIZES:
        for number in range(count):
            pick = random.Random(f"{seed} {D} {number}")
            torch.manual_seed(pick.getrandbits(32))
            dtype = pick.choice([torch.bfloat16, torch.float16, torch.float32])
            for call in (random_triangle_call(pick, dtype, D), random_block_call(pick, dtype, D)):
                share = check_call(call)
                name = f"{type(call).__name__} {NAMES[dtype]}"
                worst[name] = max(worst.get(name, 0.0), share)
    print(f"{2 * count * len(HEAD_SIZES)} calls right, largest errors {worst}", flush=True)
    return {"calls": 2 * count * len(HEAD_SIZES), "largest_errors": worst}


def check_call(call: Call) -> float:
    """The largest error as a share of the largest value."""
    _append_ahead(call)
    before = [cache.clone() for cache in call.cache]
    integers = torch.tensor(
        [[end - 1 for end in call.ends], call.prompts, call.first_valid],
        dtype=torch.int32,
        device="cuda",
    )
    inputs = Inputs(call.query.transpose(1, 2), *call.cache, *integers)
    problem = call.new_problem()
    fields: dict[str, float] = {
        "sink": problem.sink, "window": problem.window, "last": problem.last,
        "scale": call.query.shape[-1] ** -0.5, "softcap": call.softcap,
    }  # fmt: skip
    if isinstance(call, BlockCall):
        fields |= {"mass": call.rule.mass, "min_length": call.rule.min_length}
        output = run_kernels("block_sparse", inputs, fields, call.mask)
        if wrong := call.wrong_choices():
            raise SystemExit(f"{len(wrong)} tiles chose otherwise: {wrong[:5]}")
    else:
        output = attend_triangle(*inputs, *fields.values())
    for old, new in zip(before, call.cache, strict=True):
        if not torch.equal(old.nan_to_num(), new.nan_to_num()):
            raise SystemExit("the cache was written to")
    expected = call.expected().transpose(1, 2)
    off, most = float((output.double() - expected).abs().max()), float(expected.abs().max())
    room = 10 if call.query.dtype == torch.float32 else 1
    if not off <= room * TOLERANCES[NAMES[call.query.dtype]] * most:
        raise SystemExit(
            f"off by {off} of {most}: {call.query.dtype} {tuple(call.query.shape)} "
            f"{tuple(call.cache[0].shape)} {fields} ends {call.ends} prompts {call.prompts} "
            f"first {call.first_valid}"
        )
    return off / (most or 1.0)


def _append_ahead(call: Call) -> None:
    """The new tokens into the cache, as a model's own cache has them before attention."""
    S = call.query.shape[1]
    for cache, fresh in zip(call.cache, (call.key, call.value), strict=True):
        for b, end in enumerate(call.ends):
            start = max(0, end - S)
            cache[b, :, start:end] = fresh[b, : end - start].transpose(0, 1)


def attention(rounds: int) -> dict[str, Any]:
    """Ours, and what ran before it (flex_attention, SDPA whole or by blocks), in milliseconds.

    On the device, all kernels of a call; and a call of a chain, which the host may hold up.
    """
    print(f"{'':24} {'device':>17} {'ratio':>7} {'chained':>17} {'ratio':>7}  (ours, before)")
    found = dict[str, Any]()
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        given = (*shape.tensors(), shape.rows(), shape.attention())
        runs: dict[str, Callable[[], object]] = {
            "ours": lambda given=given: kernel_triangle(*given),  # type: ignore[misc]
            "before": lambda given=given: before(*given),  # type: ignore[misc]
        }
        device = in_turns(runs, rounds, lambda run: sum(kernel_times(run, 3).values()))
        chained = in_turns(runs, rounds, lambda run: event_time(run, 5))
        found[name] = {"device": device, "chained": chained}
        columns = [
            f"{x['ours']:8.4f} {x['before']:8.4f} {x['before'] / x['ours']:7.2f}"
            for x in (device, chained)
        ]
        print(f"{name:24} {columns[0]} {columns[1]}", flush=True)
    return found


def before(q: Tensor, k: Tensor, v: Tensor, rows: Rows, layer: Attention) -> Tensor:
    """What a patched layer runs where the kernels do not take a call."""
    with without_kernels():
        return triangle_attention(q, k, v, rows, layer)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Has `patch` do without the library."""
    names = {"why_not_kernels": lambda *_: "left out", "beats_sdpa": lambda *_: False}
    kept = {name: getattr(backends, name) for name in names}
    try:
        for name, value in names.items():
            setattr(backends, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(backends, name, value)


def in_turns(
    runs: dict[str, Callable[[], object]], rounds: int, measure: Callable[[Any], float]
) -> dict[str, float]:
    """Median of each, the order turned every round: a hot card clocks later ones lower."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs)[:: 1 if number % 2 == 0 else -1]:
            samples[name].append(measure(runs[name]))
    return {name: statistics.median(values) for name, values in samples.items()}


def host(rounds: int) -> dict[str, Any]:
    """Microseconds that the host is busy with a call, of calls that the queue can hold."""
    found = dict[str, Any]()
    for name, shape in {"decode 2K": Shape(1, 2048), "prompt 1K": Shape(1024, 1024)}.items():
        q, k, v = shape.tensors()
        rows, layer = shape.rows(), shape.attention()
        of_rows, scale = device_lengths(rows, shape.new, q.device), layer.scale
        numbers = (8, 512, 128, scale, 0.0)

        def operator(q=q, k=k, v=v, of_rows=of_rows, numbers=numbers):  # type: ignore[no-untyped-def]
            return attend_triangle(q, k, v, *of_rows, *numbers)

        def chosen(q=q, k=k, v=v, rows=rows, layer=layer):  # type: ignore[no-untyped-def]
            return triangle_attention(q, k, v, rows, layer)

        def without(q=q, k=k, v=v, rows=rows, layer=layer):  # type: ignore[no-untyped-def]
            return before(q, k, v, rows, layer)

        runs = {"operator": operator, "patched layer": chosen, "before": without}
        found[name] = in_turns(runs, rounds, host_time)
        with torch.inference_mode():
            found[name]["operator, inference mode"] = host_time(operator)
        print(f"host us, {name}: {found[name]}", flush=True)
    return found


def host_time(run: Callable[[], object], calls: int = 200) -> float:
    """Microseconds a call, device work left in the queue (which holds 1,024 launches)."""
    for _ in range(20):
        run()
    samples = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        samples.append((time.perf_counter() - begin) / calls * 1e6)
    torch.cuda.synchronize()
    return statistics.median(samples)


def prefill(folder: Path | None, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of a patched model's prompt by both, and how far apart the last logits are."""
    model = load_model(folder)
    plan = json.loads((Path(__file__).parents[1] / "models/smollm2/plan.json").read_text())
    patch(model, TriangleMixConfig(triangle_layer_indices=plan["triangle_layers"]))
    ids = torch.randint(3, 49000, (1, tokens), device="cuda")
    logits = dict[str, Tensor]()

    def run(name: str) -> None:
        with nullcontext() if name == "ours" else without_kernels():
            logits[name] = model(input_ids=ids, logits_to_keep=1).logits

    def seconds(one: Callable[[], object]) -> float:
        one()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        one()
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    runs = {name: lambda name=name: run(name) for name in ("ours", "flex")}  # type: ignore[misc]
    found: dict[str, Any] = in_turns(runs, rounds, seconds)
    found["share"] = found["ours"] / found["flex"]
    found["logits_apart"] = float((logits["ours"] - logits["flex"]).abs().max())
    found["model"] = "random weights" if folder is None else folder.name
    print(f"prefill of {tokens} tokens: {found}", flush=True)
    return found


def load_model(folder: Path | None) -> Any:
    """The model of a folder, or SmolLM2-135M's shape with random weights; bfloat16, on the GPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if folder is not None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return model.to("cuda").eval()
    config = AutoConfig.for_model(
        "llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
        max_position_embeddings=8192, rope_theta=100000.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to("cuda").eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks, then times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--calls", type=int, default=20, help="random calls for each head size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder of SmolLM2")
    parser.add_argument("--tokens", type=int, default=8000)
    o = parser.parse_args(arguments)
    if why := why_not_device(0):
        raise SystemExit(f"the kernels do not run here: {why}")
    report: dict[str, Any] = {"run": describe_run(["torch"])}
    print(json.dumps(report["run"]))
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "check": lambda: check(o.calls, o.seed),
        "attention": lambda: attention(o.rounds),
        "host": lambda: host(o.rounds),
        "prefill": lambda: prefill(o.model, o.tokens, o.rounds),
    }
    torch._dynamo.config.recompile_limit = 64  # flex_attention beyond it runs uncompiled
    with torch.no_grad():
        for name in filter(None, o.parts.split(",")):
            report[name] = parts[name]()
            if o.output:
                o.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
