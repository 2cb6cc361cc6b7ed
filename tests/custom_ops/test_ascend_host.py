"""The Ascend operator's host sources: the node of the contract, shapes, tiling, build script.

They are compiled against stand-ins for CANN's headers, as C++11, which is what CANN's own operator
projects were made with at first. CANN itself has never compiled them.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.triangle.contract import ATTRIBUTES, OP_TYPE, TrianglePattern

from tests.custom_ops.ascend_operator import SOURCES, compile_library

STUB: Final = Path(__file__).parent / "ascend" / "host_stub"
BUILD: Final = SOURCES / "build.sh"
NEVER: Final = "never compiled by CANN"
FLOAT, INT = 1, 2
NUMBERS: Final = {
    contract.ATTR_NUM_HEADS: 32,
    contract.ATTR_KV_NUM_HEADS: 8,
    contract.ATTR_SINK: 0,
    contract.ATTR_WINDOW: -1,
    contract.ATTR_LAST: 64,
}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    target = tmp_path_factory.mktemp("host") / "host.so"
    options = ("-O0", "-std=c++11", f"-I{STUB}")
    library = ctypes.CDLL(str(compile_library(STUB / "host_functions.cc", target, options)))
    for name in ("ascend_definition", "ascend_plugin", "ascend_parse"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def test_the_definition_is_the_contract(host: Any) -> None:
    lines = [line.split() for line in host.ascend_definition().decode().splitlines()]
    names = {kind: tuple(line[1] for line in lines if line[0] == kind) for kind, *_ in lines}
    assert names["input"] == contract.INPUTS
    assert names["output"] == contract.OUTPUTS
    known = (*(name for name in ATTRIBUTES if name != contract.ATTR_INTERLEAVED),)
    assert names["attribute"] == known
    assert names["chip"] == ("ascend910b", "ascend910_93")
    optional = {line[1] for line in lines if line[0] == "input" and line[2] == "1"}
    assert optional == {"past_key", "past_value", "prompt_length", "first_valid"}
    default = TrianglePattern().as_attributes()
    written = {line[1]: line[3] for line in lines if line[0] == "attribute"}
    assert {name: int(written[name]) for name in default} == default


def test_the_plugin_is_for_our_node(host: Any) -> None:
    name = f"{contract.DOMAIN}::{contract.OP_VERSION}::{OP_TYPE}"
    assert host.ascend_plugin().decode() == f"{OP_TYPE} {name}"


def parse(host: Any, attributes: Sequence[Mapping[str, object]], inputs: int = 9) -> str:
    text = json.dumps({"attribute": list(attributes), "name": 'a "node"', "input": ["x", "y"]})
    said: str = host.ascend_parse(text.encode(), ctypes.c_int64(inputs)).decode()
    return said


def spelled(as_text: bool) -> list[dict[str, object]]:
    """Attributes as JSON: floats are text there, integers were seen as numbers."""
    attributes: list[dict[str, object]] = [
        {"name": name, "type": INT, "i": str(value) if as_text else value}
        for name, value in NUMBERS.items()
        if value
    ]
    attributes.append({"name": contract.ATTR_SINK, "type": INT})  # protobuf leaves zeros out
    attributes.append({"f": "0.125", "floats": [], "name": contract.ATTR_SCALE, "type": FLOAT})
    return attributes


@pytest.mark.parametrize("as_text", [True, False])
def test_the_plugin_copies_attributes(host: Any, as_text: bool) -> None:
    found = dict(line.split("=") for line in parse(host, spelled(as_text)).splitlines())
    assert {name: int(found[name]) for name in NUMBERS} == NUMBERS
    assert float(found[contract.ATTR_SCALE]) == 0.125
    assert contract.ATTR_SOFTCAP not in found


@pytest.mark.parametrize(
    "attributes",
    [
        [],
        [{"name": contract.ATTR_NUM_HEADS, "type": INT, "i": 4}],
        [*spelled(False), {"name": contract.ATTR_INTERLEAVED, "type": INT, "i": 1}],
        [*spelled(False), {"name": contract.ATTR_SOFTCAP, "type": INT, "i": 1}],
        [*spelled(False), {"name": contract.ATTR_SOFTCAP, "type": FLOAT, "f": "x"}],
    ],
    ids=["none", "one-missing", "rotation", "wrong-type", "no-number"],
)
def test_the_plugin_refuses(host: Any, attributes: list[dict[str, object]]) -> None:
    assert parse(host, attributes) == "refused"


def test_the_plugin_refuses_other_nodes(host: Any) -> None:
    assert parse(host, spelled(False), inputs=11) == "refused"
    for text in (None, b"", b"{", b'{"attribute": [{"name": "num_heads"', b"[]"):
        assert host.ascend_parse(text, ctypes.c_int64(9)) == b"refused", text


def infer(host: Any, dims: Sequence[int], heads: tuple[int, int] = (8, 2)) -> list[int] | int:
    """Shapes of the outputs, cube cores and workspace; or the code of a refusal."""
    results = (ctypes.c_int64 * 13)()
    code = host.ascend_host(
        (ctypes.c_int64 * 13)(*dims),
        ctypes.c_int64(4 if len(dims) > 9 else 0),
        (ctypes.c_int64 * 5)(*heads, 8, 512, 128),
        (ctypes.c_float * 2)(0.0, 0.0),
        results,
    )
    return code or list(results)


QUERY: Final = (1, 128, 8 * 64, 1, 128, 2 * 64, 1, 128, 2 * 96)
TILE_WORKSPACE: Final = 2 * 128 * (128 * 4 + 128 * 2 + 96 * 4)
SYSTEM_WORKSPACE: Final = 16 * 2**20


def test_shapes_and_tiling(host: Any) -> None:
    """A present with the past's slots; without a past it holds the call's tokens."""
    tiled = [20, SYSTEM_WORKSPACE + 20 * TILE_WORKSPACE]
    shapes = [1, 128, 8 * 96, 1, 2, 1000, 64, 1, 2, 1000, 96]
    assert infer(host, (*QUERY, 1, 2, 1000, 64)) == [*shapes, *tiled]
    shapes[5] = shapes[9] = 128
    assert infer(host, QUERY) == [*shapes, *tiled]
    assert infer(host, (*QUERY, 1, 2, 0, 64)) == [*shapes, *tiled]


def test_a_call_that_does_not_fit_is_refused(host: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert infer(host, QUERY, heads=(8, 0)) == 1
    assert infer(host, (1, 128, 8 * 72, 1, 128, 2 * 72, 1, 128, 2 * 72)) == 2
    assert "a head size is 72" in capfd.readouterr().err


# ------------------------------------------------------------------------------ build script


def build(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        ["sh", str(BUILD), *arguments],
        cwd=folder,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_cann_the_script_says_so_in_one_line(tmp_path: Path) -> None:
    done = build(tmp_path)
    assert done.returncode == 77
    assert len(done.stderr.splitlines()) == 1
    assert "CANN's toolkit is missing" in done.stderr
    assert NEVER in done.stderr


MSOPGEN: Final = """#!/bin/sh
# msopgen gen -i JSON -f onnx -c ai_core-SOC -lan cpp -out FOLDER
[ "$1 $3 $4 $5 $6 $7" = "gen $3 -f onnx -c ai_core-Ascend910B4" ] && [ -f "$3" ] || exit 3
out="${11}"
mkdir -p "$out/op_host" "$out/op_kernel" "$out/framework/onnx_plugin"
echo template | tee "$out/op_host/triangle_attention_tiling.h" > "$out/op_kernel/other.cpp"
echo '"value": "customize"' > "$out/CMakePresets.json"
printf '%s\\n' "$BUILD" > "$out/build.sh"
"""


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A folder that has what the script uses of CANN: a program that makes a project."""
    tool = tmp_path / "cann" / "python" / "site-packages" / "bin" / "msopgen"
    tool.parent.mkdir(parents=True)
    tool.write_text(MSOPGEN)
    tool.chmod(0o755)
    return tmp_path / "cann"


def test_with_a_toolkit_our_sources_replace_the_templates(tmp_path: Path, toolkit: Path) -> None:
    making = "mkdir build_out && touch build_out/custom_opp_x.run"
    done = build(tmp_path, "Ascend910B4", "work", ASCEND_HOME_PATH=str(toolkit), BUILD=making)
    assert done.returncode == 0, done.stderr
    assert NEVER in done.stderr
    assert "custom_opp_x.run" in done.stdout
    work = tmp_path / "work"
    for folder in ("op_host", "op_kernel", "framework/onnx_plugin"):
        ours = {path.name for path in (SOURCES / folder).iterdir()}
        ours |= {"tiles.h"} if folder == "op_kernel" else set()
        assert {path.name for path in (work / folder).iterdir()} == ours
    assert "trianglemix" in (work / "CMakePresets.json").read_text()


@pytest.mark.parametrize(
    ("soc", "making", "words"),
    [
        ("Ascend310P3", "", "Ascend310P3 is not a 910B or 910_93 chip"),
        ("Ascend910B4", "exit 5", "CANN's build failed"),
        ("Ascend910B4", "mkdir build_out", "no custom_opp_*.run"),
    ],
)
def test_a_failed_build_is_said(
    tmp_path: Path, toolkit: Path, soc: str, making: str, words: str
) -> None:
    done = build(tmp_path, soc, "work", ASCEND_HOME_PATH=str(toolkit), BUILD=making)
    assert done.returncode == 1
    assert words in done.stderr


def test_every_source_says_that_cann_never_compiled_it() -> None:
    sources = [path for path in SOURCES.rglob("*") if path.suffix in {".h", ".cpp", ".cc", ".sh"}]
    assert len(sources) > 12
    for path in (*sources, SOURCES / "README.md"):
        assert NEVER in path.read_text().replace("Never", "never"), path
