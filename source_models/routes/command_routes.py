"""Exporters that are commands: optimum-cli, onnxruntime-genai's model builder, mobius."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

from source_models.routes.worker import NoSourceError, work

_BIN: Final = Path(sys.executable).parent
_GENAI: Final = (sys.executable, "-m", "onnxruntime_genai.models.builder")


def _genai(precision: str, provider: str, *options: str) -> list[str]:
    command = [*_GENAI, "-i", "{folder}", "-o", "{target}", "-c", "{target}/cache"]
    extra = ["--extra_options", *options] if options else []
    return [*command, "-p", precision, "-e", provider, *extra]


def _mobius(*options: str) -> list[str]:
    build = [str(_BIN / "mobius"), "build", "--config", "{folder}", "--runtime", "ort-genai"]
    return [*build, *options, "{target}"]


ROUTES: Final[dict[str, list[str]]] = {
    "optimum": [str(_BIN / "optimum-cli"), "export", "onnx", "--task",
                "text-generation-with-past", "-m", "{folder}", "{target}"],
    "genai-fp32-cpu": _genai("fp32", "cpu"),
    "genai-fp32-cpu-unpacked": _genai("fp32", "cpu", "fuse_qkv=false", "windowed_kv_cache=false"),
    # float32 activations: rounded to 8 bits, tiny differences jump by a hundredth of a logit
    "genai-int4-cpu": _genai("int4", "cpu", "accuracy_level=1"),
    "genai-fp16-cuda": _genai("fp16", "cuda"),
    "genai-fp16-cuda-unfused": _genai(
        "fp16", "cuda", "fuse_qkv=false", "fuse_qk_norm_gqa=false", "windowed_kv_cache=false"
    ),
    "mobius": _mobius(),
    "mobius-cpu": _mobius("--ep", "cpu"),
    "mobius-static": _mobius("--static-cache", "--max-seq-len", "96"),
}  # fmt: skip


def make(route: str, folder: Path, target: Path) -> None:
    """Runs the route's command; its last words are the reason where it fails."""
    command = [part.format(folder=folder, target=target) for part in ROUTES[route]]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env=offline, timeout=600)
    if done.returncode or not list(target.glob("*.onnx")):
        words = _last_error(done.stdout + done.stderr)
        raise NoSourceError(words or f"exit code {done.returncode}")


def _last_error(text: str) -> str | None:
    """The line that names the exception, or else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (named or lines or [None])[-1]


if __name__ == "__main__":
    sys.exit(work(make))
