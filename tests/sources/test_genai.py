"""An exported folder of genai's builder runs in onnxruntime-genai, library and all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from trianglemix.custom_ops.library import library_path
from trianglemix.exporter.options import ExportOptions, LayerRequest, PatternRequest
from trianglemix.exporter.pipeline import export
from trianglemix.manifest.manifest import Manifest

from tests.sources.cell import SilentObserver
from tests.sources.decoder import Decoder
from tests.sources.oracle import Text
from tests.sources.other_environment import made_source, run_program

_PATTERN: Final = PatternRequest(4, 16, 8)
_EXACT: Final = 4 + 16 + 8
_NEW: Final = 12
_GENERATE: Final = """
import json, sys
import onnxruntime_genai as og
given = json.loads(sys.argv[1])
model = og.Model(given["folder"])
parameters = og.GeneratorParams(model)
parameters.set_search_options(do_sample=False, **given["search"])
generator = og.Generator(model, parameters)
generator.append_tokens(given["prompt"])
first = [float(x) for x in generator.get_logits()[0, -1]]
while not generator.is_done():
    generator.generate_next_token()
tokens = [int(x) for x in generator.get_sequence(0)]
print(json.dumps({"tokens": tokens[len(given["prompt"]):], "logits": first}))
"""


def _generate(folder: Path, prompt: list[int], **search: Any) -> dict[str, Any]:
    options = {"max_length": len(prompt) + _NEW, **search}
    given = {"folder": str(folder), "prompt": prompt, "search": options}
    result: dict[str, Any] = run_program("genai", _GENERATE, given)
    return result


def _prompt(length: int) -> list[int]:
    return [int(x) for x in np.random.default_rng(length).integers(0, 256, length)]


def _exported(route: str, output: Path, target: str = "cpu") -> tuple[Path, Path]:
    source = made_source("genai", route, "llama")
    layers = LayerRequest(start_layer=0)
    options = ExportOptions(source, output, target=target, pattern=_PATTERN, layers=layers)
    export(options, SilentObserver())
    return source, output


def _share_buffers(folder: Path, share: bool) -> None:
    path = folder / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["search"]["past_present_share_buffer"] = share
    path.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("share", [True, False], ids=["shared buffers", "growing cache"])
@pytest.mark.parametrize("route", ["genai-fp32-cpu", "genai-int4-cpu"])
@pytest.mark.parametrize("target", ["cpu", "cuda", "hopper"])
def test_short_prompts_keep_their_tokens(
    tmp_path: Path, target: str, route: str, share: bool
) -> None:
    """Nodes for cuda and hopper rotate inside; here they run on the CPU."""
    source, output = _exported(route, tmp_path / "out", target)
    _share_buffers(output, share)
    prompt = _prompt(_EXACT - _NEW)
    assert _generate(output, prompt)["tokens"] == _generate(source, prompt)["tokens"]


def _decoder_logits(folder: Path, prompt: list[int], calls: list[int]) -> np.ndarray:
    """Logits of the prompt's last token when each chunk's own end counts as the prompt's."""
    decoder = Decoder(folder / "model.onnx", Manifest.load(folder), kernel=True)
    return decoder.logits(Text(np.array([prompt]), np.zeros(1, np.int64)), calls)[0, -1]


@pytest.mark.parametrize("target", ["cpu", "cuda", "hopper"])
@pytest.mark.parametrize("chunk", [None, 32])
def test_long_prompts_are_triangles(tmp_path: Path, chunk: int | None, target: str) -> None:
    """With `chunk_size`, a chunk's last rows are dense: genai says no `prompt_length`."""
    source, output = _exported("genai-fp32-cpu", tmp_path / "out", target)
    prompt = _prompt(100)
    search = {} if chunk is None else {"chunk_size": chunk}
    calls = [100] if chunk is None else [32, 32, 32, 4]
    logits = np.array(_generate(output, prompt, **search)["logits"])
    expected = _decoder_logits(output, prompt, calls)
    np.testing.assert_allclose(logits, expected, atol=2e-4 * np.abs(expected).max())
    dense = np.array(_generate(source, prompt)["logits"])
    assert np.abs(logits - dense).max() > 1e-2 * np.abs(dense).max(), "nothing was dropped"


def test_both_libraries_lie_in_the_folder(tmp_path: Path) -> None:
    """The CUDA kernels are looked for beside the operator library."""
    _, output = _exported("genai-fp32-cpu", tmp_path / "out")
    built = {file.name for file in library_path().parent.glob("libtrianglemix_*.so")}
    assert built <= {file.name for file in output.iterdir()}
