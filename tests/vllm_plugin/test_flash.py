"""The CUDA backend over vLLM's own Python files of each version, and the insides it leans on.

The kernels are PyTorch; what runs on a GPU is said in docs/vllm.md. `make vllm` fetches the files.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
from pathlib import Path
from typing import Final

import pytest

from tests.vllm_plugin.served_models import ENVIRONMENT, PYTHON, QUIET, ROOT

FILES: Final = {
    "0.26": ROOT / "build" / "envs" / "vllm-files-0.26.0",
    "0.32": next(ENVIRONMENT.glob("lib/python*/site-packages"), ENVIRONMENT),
    "0.33": ROOT / "build" / "envs" / "vllm-files-0.33.0",
}
LEANED_ON: Final = {
    "v1/attention/backend.py": {
        "CommonAttentionMetadata": ("rswa_prefix_lens", "seq_lens_cpu_upper_bound", "seq_lens",
                                    "query_start_loc_cpu", "block_table_tensor", "max_query_len"),
        "AttentionMetadataBuilder": ("supports_update_block_table", "build_for_drafting"),
        "AttentionCGSupport": ("UNIFORM_SINGLE_TOKEN_DECODE",),
    },
    "v1/attention/backends/flash_attn.py": {
        "FlashAttentionMetadataBuilder": ("build", "get_cudagraph_support"),
        "FlashAttentionBackend": ("get_impl_cls", "get_builder_cls"),
    },
    "v1/attention/backends/registry.py": {"AttentionBackendEnum": ("FLASH_ATTN", "CPU_ATTN")},
    "engine/arg_utils.py": {"EngineArgs": ("create_engine_config",)},
    "v1/engine/input_processor.py": {"InputProcessor": ("process_inputs",)},
    "v1/engine/__init__.py": {"EngineCoreRequest": ("cache_salt",)},
    "config/model_arch.py": {"ModelArchitectureConfig": (
        "rswa_window", "total_num_attention_heads", "total_num_kv_heads")},
    "config/model.py": {"ModelConfig": (
        "rswa_window", "disable_cascade_attn", "get_total_num_hidden_layers", "get_head_size",
        "get_hidden_size", "get_vocab_size", "get_layers_start_end_indices", "use_mla",
        "is_encoder_decoder", "is_mm_prefix_lm")},
    "config/parallel.py": {"ParallelConfig": (
        "prefill_context_parallel_size", "decode_context_parallel_size", "use_ubatching",
        "tensor_parallel_size", "rank")},
    "config/cache.py": {"CacheConfig": ("cache_dtype", "kv_sharing_fast_prefill")},
    "config/attention.py": {"AttentionConfig": (
        "backend", "backend_per_kind", "flash_attn_version")},
    "config/vllm.py": {"VllmConfig": ("additional_config", "instance_id")},
}  # fmt: skip
"""By file and class the names that the plug-in reads or replaces."""
HANDED_OVER: Final = {
    "v1/worker/gpu_model_runner.py": "rswa_prefix_lens = num_prompt_tokens_cpu",
    "v1/worker/gpu/model_runner.py": "prompt_lens = self.req_states.prompt_len.gpu[idx_mapping]",
}
"""Where each runner hands over prompt lengths, if a window behind a reference is named."""


def _source(version: str, file: str) -> str:
    path = FILES[version] / "vllm" / file
    if not path.is_file():
        pytest.skip(f"vLLM {version} is not looked into: no {path.parent}, run `make vllm`")
    return path.read_text(encoding="utf-8")


def _members(source: str) -> dict[str, set[str]]:
    """By class the names of its methods and fields."""
    found = dict[str, set[str]]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            names = found.setdefault(node.name, set())
            for child in node.body:
                targets = getattr(child, "targets", [getattr(child, "target", None)])
                names |= {getattr(target, "id", None) for target in targets} - {None}
                names |= {child.name} if isinstance(child, ast.FunctionDef) else set()
    return found


@pytest.mark.parametrize("file", LEANED_ON)
@pytest.mark.parametrize("version", FILES)
def test_the_names_that_we_lean_on_are_there(version: str, file: str) -> None:
    members = _members(_source(version, file))
    for owner, names in LEANED_ON[file].items():
        assert set(names) <= members[owner], f"{owner} of vLLM {version}"


@pytest.mark.parametrize("file", HANDED_OVER)
@pytest.mark.parametrize("version", FILES)
def test_runners_hand_over_prompt_lengths(version: str, file: str) -> None:
    lines = [line.strip() for line in _source(version, file).splitlines()]
    place = lines.index(HANDED_OVER[file])
    before = [line for line in lines[place - 3 : place] if not line.startswith("#")]
    assert "if self.model_config.rswa_window is not None:" in before


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("version", FILES)
def test_steps_through_vllm_s_own_builder_and_forward(version: str, seed: int) -> None:
    _source(version, "v1/attention/backends/flash_attn.py")
    program = Path(__file__).with_name("flash_run.py")
    done = subprocess.run(
        [str(PYTHON), str(program), str(seed)], capture_output=True, text=True, timeout=200,
        env=os.environ | QUIET | {"PYTHONPATH": str(FILES[version])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    streamed, sparse = re.search(r"streamed (\d+) sparse (\d+)", done.stdout).groups()
    assert int(streamed) > 50
    assert int(sparse) > 20
