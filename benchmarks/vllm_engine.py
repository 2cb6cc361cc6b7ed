"""One engine of vLLM for benchmarks/vllm_ttft.py: told by lines of JSON what to do, in a process.

    python -m benchmarks.vllm_engine SETTINGS            (JSON; see `Settings`)

A line `{"task": "first_token", "way": "triangle", "tokens": 8192, "seed": 0}` is answered by a line
that begins with `MARK`; with the way `block_sparse` it says the `mass`, too. The engine of
`"plugin": false` runs vLLM alone: start it with `VLLM_PLUGINS=none`.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

MARK: Final = "@answer "
ENVIRONMENT: Final = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
}
"""For a machine without internet; one process, so that the ways can be switched."""
LLAMA_8B: Final[dict[str, Any]] = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=4096,
    intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, vocab_size=128256, max_position_embeddings=140000, rms_norm_eps=1e-5,
    rope_theta=500000.0, hidden_act="silu", tie_word_embeddings=False, attention_bias=False,
    mlp_bias=False, bos_token_id=1, eos_token_id=2, torch_dtype="bfloat16",
)  # fmt: skip
"""Llama-3.1-8B's shape."""
STANDARD_DEVIATION: Final = 0.02
_FIRST_TOKEN: Final = 3


@dataclass(frozen=True)
class Settings:
    """An engine: `longest` prompt and answer together, tokens of a step, share of the memory.

    `block_sparse` makes the layers that are no triangle layers block-sparse ones. `page` is vLLM's
    `block_size`, None its own choice.
    """

    plugin: bool
    layers: int
    longest: int
    step: int
    memory: float
    requests: int
    compiled: bool
    dtype: str
    device: str
    block_sparse: bool = False
    page: int | None = None

    @property
    def section(self) -> dict[str, Any]:
        """The deeper half are triangle layers, as the published plans have it."""
        half = self.layers // 2
        section = {"layers": f"{half}-{self.layers - 1}", "pattern": [8, 512, 128]}
        if self.block_sparse:
            section["block_sparse_layers"] = f"0-{half - 1}"
            section["min_length"] = 4096 if self.device == "cuda" else 256
        return section


class Engine:
    """A model of random weights, and the layers' ways."""

    def __init__(self, settings: Settings) -> None:
        from vllm import LLM

        if settings.plugin:  # where the package is not installed there is no entry point
            import trianglemix.vllm

            trianglemix.vllm.register()
        section = {"trianglemix": settings.section}
        ours = {"additional_config": section} if settings.plugin else {}
        pages = {"block_size": settings.page} if settings.page else {}
        self.llm = LLM(
            model=str(_model_folder(settings)), load_format="dummy", skip_tokenizer_init=True,
            max_model_len=settings.longest, max_num_batched_tokens=settings.step,
            max_num_seqs=settings.requests, enable_prefix_caching=False, disable_log_stats=True,
            dtype=settings.dtype, enforce_eager=not settings.compiled,
            gpu_memory_utilization=settings.memory, **ours, **pages,
        )  # fmt: skip
        self.vocabulary = self.llm.llm_engine.vllm_config.model_config.get_vocab_size()
        self._fill_weights()
        self._builders: dict[int, tuple[Any, Any]] = {}

    def switch(self, way: str, mass: float | None) -> None:
        """`triangle`; `block_sparse`, which has both roles, the rule at that mass; or `dense`: our
        classes, whose steps are then never split."""
        if not self._builders:
            groups = [group for kind in self._runner().attn_groups for group in kind]
            found = [builder for group in groups for builder in group.metadata_builders]
            layers = {id(builder): (builder, getattr(builder, "_layers", ())) for builder in found}
            self._builders = {key: pair for key, pair in layers.items() if pair[1]}
            assert self._builders, "the engine does not run through the plug-in"
        for builder, layers in self._builders.values():
            builder._layers = tuple(_at_mass(layer, mass) for layer in layers
                                    if layer.role == way or way == "block_sparse")  # fmt: skip

    def first_token(self, tokens: int, seed: int) -> dict[str, Any]:
        """Seconds until the first token of a prompt, and the token with its log-probability."""
        answer, seconds = self._generate([self._prompt(tokens, seed)], 1)
        (token,) = answer[0].outputs[0].token_ids
        log = float(answer[0].outputs[0].logprobs[0][token].logprob)
        assert log < 0, f"the log-probability is {log}"
        return {"seconds": seconds, "token": token, "log": log}

    def density(self, tokens: int, seed: int) -> dict[str, Any]:
        """The share of the causal blocks that the block-sparse layers keep of a prompt."""
        from benchmarks.vllm_density import counting_blocks

        layers = [layer for builder, _ in self._builders.values() for layer in builder._layers
                  if layer.role == "block_sparse"]  # fmt: skip
        heads = self.llm.llm_engine.vllm_config.model_config.model_arch_config
        with counting_blocks() as found:
            self.first_token(tokens, seed)
        number = heads.total_num_attention_heads
        return {"density": found.density(number, len(layers), tokens)}

    def decode(self, tokens: int, seed: int, requests: int, steps: int) -> dict[str, Any]:
        """Tokens per second of `requests` answers at once, the time to read prompts taken off."""
        prompts = [self._prompt(tokens, seed + number) for number in range(requests)]
        reading = self._generate(prompts, 1)[1]
        seconds = self._generate(prompts, steps + 1)[1] - reading
        return {"seconds": seconds, "tokens_per_second": requests * steps / seconds}

    def load(self, arrivals: list[list[float]], steps: int) -> dict[str, Any]:
        """Requests that come while others run: `arrivals` are `[second, tokens, seed]`, in order.

        Returns for each its seconds until the first token, and the seconds until all are done.
        """
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=steps, ignore_eos=True, detokenize=False
        )
        engine, came, first = self.llm.llm_engine, dict[str, float](), dict[str, float]()
        waiting = [(second, self._prompt(int(tokens), int(seed)))
                   for second, tokens, seed in arrivals]  # fmt: skip
        begin = time.perf_counter()
        while waiting or engine.has_unfinished_requests():
            now = time.perf_counter() - begin
            while waiting and waiting[0][0] <= now:
                name, (second, ids) = str(len(came)), waiting.pop(0)
                came[name] = second
                engine.add_request(name, {"prompt_token_ids": ids}, sampling)
            if not engine.has_unfinished_requests():
                time.sleep(waiting[0][0] - now)
                continue
            for answer in engine.step():
                if answer.outputs and answer.outputs[0].token_ids:
                    number = answer.request_id.split("-")[0]
                    first.setdefault(number, time.perf_counter() - begin)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "first": [first[name] - came[name] for name in came]}

    def _generate(self, prompts: list[list[int]], tokens: int) -> tuple[Any, float]:
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, logprobs=1, ignore_eos=True, detokenize=False
        )
        given = [{"prompt_token_ids": ids} for ids in prompts]
        begin = time.perf_counter()
        answers = self.llm.generate(given, sampling, use_tqdm=False)
        return answers, time.perf_counter() - begin

    def _prompt(self, tokens: int, seed: int) -> list[int]:
        numbers = random.Random(seed)
        return [numbers.randrange(_FIRST_TOKEN, self.vocabulary) for _ in range(tokens)]

    def _runner(self) -> Any:
        core = self.llm.llm_engine.engine_core.engine_core
        worker = core.model_executor.driver_worker
        return getattr(worker, "worker", worker).model_runner

    def _fill_weights(self) -> None:
        """vLLM's dummy weights are so small that attention is uniform."""
        import torch

        torch.manual_seed(0)
        with torch.no_grad():
            for tensor in self._runner().model.parameters():
                if tensor.dim() == 1:
                    tensor.fill_(1)
                else:
                    tensor.normal_(0, STANDARD_DEVIATION)


def _at_mass(layer: Any, mass: float | None) -> Any:
    """A layer of the plug-in, its rule with another mass if it has a rule."""
    if layer.role != "block_sparse":
        return layer
    return replace(layer, keeps=replace(layer.keeps, mass=mass))


def describe(settings: Settings) -> dict[str, Any]:
    """Versions and the device."""
    import torch
    import vllm

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return {"vllm": vllm.__version__, "torch": torch.__version__, "device": device}


def _model_folder(settings: Settings) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="trianglemix-vllm-"))
    config = LLAMA_8B | {"num_hidden_layers": settings.layers}
    if settings.device == "cpu":  # for trying the program out
        config |= dict(hidden_size=128, intermediate_size=256, num_attention_heads=4,
                       num_key_value_heads=2, head_dim=32, vocab_size=512)  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def main(settings: Settings) -> None:
    """Answers lines of the standard input until it ends."""
    engine = Engine(settings)
    print(MARK + json.dumps(describe(settings)), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        task, way, mass = asked.pop("task"), asked.pop("way"), asked.pop("mass", None)
        if settings.plugin:
            engine.switch(way, mass)
        print(MARK + json.dumps(getattr(engine, task)(**asked)), flush=True)


if __name__ == "__main__":
    os.environ |= {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
    main(Settings(**json.loads(sys.argv[1])))
