"""An exported optimum folder loads in ORTModelForCausalLM, with our library and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from trianglemix.custom_ops.library import library_path
from trianglemix.exporter.options import ExportOptions, LayerRequest, PatternRequest
from trianglemix.exporter.pipeline import export

from tests.sources.cell import SilentObserver
from tests.sources.other_environment import made_source, run_program

_PATTERN: Final = PatternRequest(4, 16, 8)
_GENERATE: Final = """
import json, sys
import onnxruntime, torch
from optimum.onnxruntime import ORTModelForCausalLM
given = json.loads(sys.argv[1])
options = onnxruntime.SessionOptions()
if given["library"]:
    options.register_custom_ops_library(given["library"])
model = ORTModelForCausalLM.from_pretrained(given["folder"], session_options=options)
ids, mask = torch.tensor(given["ids"]), torch.tensor(given["mask"])
tokens = model.generate(
    ids, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=258
)
print(json.dumps(tokens.tolist()))
"""


def _generate(folder: Path, library: str | None, ids: np.ndarray, pads: int) -> Any:
    mask = np.ones_like(ids)
    mask[0, :pads] = 0
    given = {"folder": str(folder), "library": library, "ids": ids.tolist(), "mask": mask.tolist()}
    return run_program("optimum", _GENERATE, given)


@pytest.mark.parametrize("family", ["smollm", "gpt2"])
def test_short_prompts_keep_their_tokens(tmp_path: Path, family: str) -> None:
    """A batch with one row padded on the left, shorter than what the pattern keeps whole."""
    source, output = made_source("optimum", "optimum", family), tmp_path / "out"
    layers = LayerRequest(start_layer=0)
    options = ExportOptions(source, output, pattern=_PATTERN, layers=layers, weights="copy")
    export(options, SilentObserver())
    ids = np.random.default_rng(4).integers(0, 256, (2, 17))
    expected = _generate(source, None, ids, pads=3)
    assert _generate(output, str(library_path()), ids, pads=3) == expected
    assert _generate(output, None, ids, pads=3) == expected
