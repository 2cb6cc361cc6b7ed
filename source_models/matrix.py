"""Makes the tiny random models of every export route and family, under `build/sources/`.

    python -m source_models.matrix                             # everything (most of an hour, once)
    python -m source_models.matrix --routes optimum 'dynamo-*' --families llama

Each model lies in `build/sources/<route>/<family>/`; a folder that holds only `no_source.txt` says
why the route cannot make the family. Routes whose pins conflict run in environments of their
own under `build/envs/`, made at first use. Nothing is made twice.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
SOURCES: Final = ROOT / "build" / "sources"
_ENVIRONMENTS: Final = ROOT / "build" / "envs"

_PACKAGES: Final = {
    "optimum": ("optimum-onnx==0.1.0", "optimum==2.1.0", "transformers==4.57.6",
                "onnxruntime==1.31.1", "onnx==1.23.2"),
    "genai": ("onnxruntime-genai==0.18.0", "mobius-onnx==0.1.0", "transformers==5.23.0",
              "onnxruntime==1.31.1", "onnx==1.23.2", "onnx-ir==1.1.0"),
}  # fmt: skip
_TORCH: Final = "torch==2.13.0"
_HERE: Final = "this"  # the environment that runs this script

_TORCH_ROUTES: Final = (
    *(f"dynamo-sdpa-{opset}" for opset in (20, 23, 24, 18)),
    *(f"dynamo-eager-{opset}" for opset in (20, 23, 24, 18)),
    "torchscript-sdpa-18",
    "torchscript-eager-18",
)
_GENAI_ROUTES: Final = (
    "genai-fp32-cpu", "genai-fp32-cpu-unpacked", "genai-int4-cpu", "genai-fp16-cuda",
    "genai-fp16-cuda-unfused", "mobius", "mobius-cpu", "mobius-static",
)  # fmt: skip
ROUTES: Final[dict[str, tuple[str, str]]] = {
    "optimum": ("optimum", "command_routes"),
    **dict.fromkeys(_GENAI_ROUTES, ("genai", "command_routes")),
    **dict.fromkeys(_TORCH_ROUTES, (_HERE, "torch_routes")),
    "onnx-exporter": (_HERE, "transformers_route"),
    "onnx-exporter-cpu": (_HERE, "transformers_route"),
    "onnx-exporter-cuda": (_HERE, "transformers_route"),
    "onnx-exporter-dml": (_HERE, "transformers_route"),
}
"""Route: the environment and the module of `source_models.routes` that make it."""

RUNNABLE_TWINS: Final = {"genai-fp16-cuda": "genai-fp16-cuda-unfused"}
"""Route whose graphs ONNX Runtime's CPU provider may not run: the same exporter's that it runs."""

FAMILIES: Final = (
    "llama", "qwen2", "qwen3", "mistral", "mistral-v0.1", "phi3", "gemma2", "gemma3", "gpt2",
    "smollm", "qwen3_moe", "mixtral",
)  # fmt: skip
DEEP_FAMILY: Final = "llama-32"  # for timing: no column of the matrix


def main() -> int:
    """Makes what is missing; the exit code is 0 whatever the routes refuse."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--routes", nargs="+", default=["*"], help="names or patterns")
    parser.add_argument("--families", nargs="+", default=["*"], help="names or patterns")
    arguments = parser.parse_args()
    make_sources(_chosen(ROUTES, arguments.routes), _chosen(FAMILIES, arguments.families))
    return 0


def make_sources(routes: list[str], families: list[str]) -> None:
    """Makes what is missing of these families by these routes."""
    _run("optimum", "families", [("folder", family) for family in families])
    for route in routes:
        environment, module = ROUTES[route]
        _run(environment, module, [(route, family) for family in families])


def _chosen(names: object, patterns: list[str]) -> list[str]:
    assert isinstance(names, tuple | dict)
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def _run(environment: str, module: str, cells: list[tuple[str, str]]) -> None:
    missing = [
        (route, family) for route, family in cells if not (SOURCES / route / family).is_dir()
    ]
    if not missing:
        return
    command = [str(_python(environment)), "-m", f"source_models.routes.{module}"]
    for route, family in missing:
        command += [route, str(SOURCES / "folder" / family), str(SOURCES / route / family)]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def _python(environment: str) -> Path:
    """The environment's interpreter; the environment is made if it is not there."""
    if environment == _HERE:
        return Path(sys.executable)
    folder = _ENVIRONMENTS / environment
    python = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for packages in ((_TORCH,), _PACKAGES[environment]):
            subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
        (folder / "complete").touch()
    return python


if __name__ == "__main__":
    sys.exit(main())
