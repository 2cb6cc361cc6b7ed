"""The commands where optional packages are missing: help always, else one line of what to install.

Each runs in a process of its own, in which the packages named cannot be found.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from trianglemix.exporter.options import ExportOptions, LayerRequest, PatternRequest
from trianglemix.exporter.pipeline import export

from tests.end_to_end.test_tiny_llm import SilentObserver
from tests.tiny_models import tiny_folder, tiny_model

PROGRAMS: Final = {
    "trianglemix-export": "exporter",
    "trianglemix-run": "runtime",
    "trianglemix-analyze": "analysis",
    "trianglemix-eval": "evaluation",
}
OPTIONAL: Final = (
    "accelerate", "gguf", "jinja2", "lm_eval", "matplotlib", "onnxruntime", "onnxscript",
    "requests", "tokenizers", "torch", "transformers",
)  # fmt: skip
_RUN: Final = """
import json, sys

package, blocked, sys.argv = json.loads(sys.argv[1])

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
exec(f"from trianglemix.{package}.cli import main")
main()
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with triangle layers 1 and 2, as ONNX."""
    output = tmp_path_factory.mktemp("exported") / "tiny"
    layers = LayerRequest(layers=(1, 2))
    pattern = PatternRequest(4, 24, 8)
    export(
        ExportOptions(tiny_model("llama").path, output, pattern=pattern, layers=layers),
        SilentObserver(),
    )
    return output


def _run(
    program: str, blocked: tuple[str, ...], *arguments: str | Path
) -> subprocess.CompletedProcess[str]:
    given = [PROGRAMS[program], blocked, [program, *map(str, arguments)]]
    return subprocess.run(
        [sys.executable, "-c", _RUN, json.dumps(given)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_and_version_need_no_optional_package(program: str) -> None:
    done = _run(program, OPTIONAL, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: ")
    done = _run(program, OPTIONAL, "--version")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_blocker_blocks(exported: Path) -> None:
    """Otherwise nothing here could fail."""
    done = _run("trianglemix-run", ("click",), exported)
    assert "No module named 'click'" in done.stderr


def test_the_tasks_are_listed_without_optional_packages() -> None:
    done = _run("trianglemix-eval", OPTIONAL, "--list-tasks")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 13


def test_exporting_and_running_need_the_cpu_packages_alone(exported: Path, tmp_path: Path) -> None:
    blocked = tuple(set(OPTIONAL) - {"onnxruntime", "tokenizers", "jinja2"})
    source, output = tiny_model("llama").path, tmp_path / "out"
    done = _run("trianglemix-export", blocked, source, "-o", output, "--start-layer", "1")
    assert done.returncode == 0, done.stderr
    answer = ["--prompt", "abc", "--max-new-tokens", "2"]
    assert _run("trianglemix-run", blocked, output, *answer).returncode == 0
    result = tmp_path / "result.json"
    small = ["--tasks", "niah_single_1", "--tokens", "900", "--samples", "1", "-o", result]
    done = _run("trianglemix-eval", blocked, exported, *small)
    assert done.returncode == 0, done.stderr
    assert result.is_file()


@pytest.mark.parametrize(
    ("program", "missing", "arguments", "extra"),
    [
        ("trianglemix-analyze", "torch", ["FOLDER", "--no-plots"], "hf"),
        ("trianglemix-analyze", "transformers", ["FOLDER", "--no-plots"], "hf"),
        ("trianglemix-analyze", "matplotlib", ["FOLDER"], "analysis"),
        ("trianglemix-analyze", "tokenizers", ["FOLDER", "--no-plots"], "cpu"),
        ("trianglemix-eval", "torch", ["FOLDER"], "hf"),
        ("trianglemix-eval", "transformers", ["FOLDER", "--layers", "1"], "hf"),
        ("trianglemix-eval", "onnxruntime", ["EXPORTED"], "cpu"),
        ("trianglemix-eval", "requests", ["--served", "http://127.0.0.1:9/v1"], "served"),
        ("trianglemix-eval", "tokenizers", ["EXPORTED"], "cpu"),
        ("trianglemix-eval", "jinja2", ["EXPORTED"], "cpu"),
        ("trianglemix-run", "onnxruntime", ["EXPORTED", "--prompt", "a"], "cpu"),
        ("trianglemix-run", "tokenizers", ["EXPORTED", "--prompt", "a"], "cpu"),
        ("trianglemix-run", "jinja2", ["EXPORTED", "--prompt", "a", "--chat"], "cpu"),
        ("trianglemix-export", "onnxruntime", ["MODEL", "--dry-run"], "cpu"),
    ],
)
def test_one_line_names_what_to_install(
    program: str, missing: str, arguments: list[str], extra: str, exported: Path, tmp_path: Path
) -> None:
    places = {"FOLDER": tiny_folder("llama"), "EXPORTED": exported}
    places["MODEL"] = tiny_model("llama").path
    output = [] if program == "trianglemix-run" else ["-o", tmp_path / "output"]
    given = [places.get(argument, argument) for argument in arguments]
    done = _run(program, (missing,), *given, *output)
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1, done.stderr
    assert missing in lines[0]
    assert f"pip install 'trianglemix[{extra}]'" in lines[0]
    assert "Traceback" not in done.stderr
