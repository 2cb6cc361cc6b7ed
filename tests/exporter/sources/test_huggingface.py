"""A Hugging Face folder becomes a graph of dense operator nodes with transformers' own logits."""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from transformers import AutoConfig
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.triangle.contract import OP_TYPE
from trianglemix.exporter.errors import ExportError, RefusedError
from trianglemix.exporter.sources.huggingface.run_worker import (
    HuggingFaceOptions,
    export_huggingface,
)

from tests.exporter.sources.huggingface_folders import (
    LENGTH,
    Exported,
    export_here,
    open_model,
    run,
    save_random,
    source_logits,
)
from tests.tiny_models import FOLDER_FAMILIES, tiny_folder

OWN_WINDOW = {"gemma2": 24}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    return {}


def export(family: str, made: dict[str, Exported], work: Path) -> Exported:
    if family not in made:
        folder = tiny_folder(family)
        made[family] = open_model(folder, export_here(folder, work))
    return made[family]


@pytest.mark.parametrize("splits", [[LENGTH], [29, LENGTH - 1, LENGTH]])
@pytest.mark.parametrize("family", FOLDER_FAMILIES)
def test_logits_equal_transformers_with_left_padding(
    family: str, splits: list[int], exported: dict[str, Exported], tmp_path: Path
) -> None:
    model = export(family, exported, tmp_path)
    ids = np.random.default_rng(3).integers(0, 256, (2, LENGTH))
    mask = np.ones_like(ids)
    mask[1, :7] = 0
    expected = source_logits(model.folder, ids, mask)
    logits = run(model.session, ids, mask, splits)
    error = np.abs(logits - expected).max(-1) * mask
    assert np.abs(expected).max() > 0.5, "flat logits would hide errors"
    assert error.max() <= 2e-4 * np.abs(expected).max(), np.unravel_index(
        error.argmax(), error.shape
    )


@pytest.mark.parametrize("family", FOLDER_FAMILIES)
def test_every_attention_is_one_dense_node_and_nothing_grows_with_the_mask(
    family: str, exported: dict[str, Exported], tmp_path: Path
) -> None:
    graph = export(family, exported, tmp_path).graph
    nodes = [node for node in graph if node.op_type == OP_TYPE]
    config = AutoConfig.from_pretrained(tiny_folder(family))
    assert len(nodes) == config.num_hidden_layers
    for layer, node in enumerate(nodes):
        assert len([x for x in node.inputs if x is not None]) == len(contract.INPUTS)
        own = family in OWN_WINDOW and config.layer_types[layer] == "sliding_attention"
        window = OWN_WINDOW[family] if own else contract.DENSE_WINDOW
        assert node.attributes[contract.ATTR_WINDOW].as_int() == window
        assert node.attributes[contract.ATTR_SINK].as_int() == 0
        assert node.inputs[3].name == f"past_key_values.{layer}.key"
        assert node.outputs[2].name == f"present.{layer}.value"
    operations = {node.op_type for node in graph}
    assert not operations & {"Softmax", "Expand", "Where", "Trilu", "Range", "IsNaN"}
    assert [value.name for value in graph.inputs[:3]] == [
        "input_ids",
        "attention_mask",
        "position_ids",
    ]


def test_weights_lie_beside_the_graph_once(tmp_path: Path) -> None:
    stages: list[str] = []
    options = HuggingFaceOptions(stage=stages.append)
    path = export_huggingface(tiny_folder("llama"), tmp_path, options)
    assert len(stages) == 4
    weights = (tiny_folder("llama") / "model.safetensors").stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert path.stat().st_size < weights
    assert (tmp_path / "model.onnx.data").stat().st_size < 1.1 * weights


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_option_converts_the_whole_graph(dtype: str, tmp_path: Path) -> None:
    graph = ir.load(export_here(tiny_folder("qwen3"), tmp_path, dtype)).graph
    expected = ir.DataType[dtype.upper()]
    caches = [value for value in graph.inputs if value.name.startswith("past")]
    assert {value.dtype for value in caches} == {expected}
    assert graph.outputs[0].dtype == expected
    assert {x.dtype for x in graph.initializers.values() if x.name.endswith("weight")} <= {expected}


def test_float16_gives_the_source_logits(tmp_path: Path) -> None:
    folder = tiny_folder("llama")
    model = open_model(folder, export_here(folder, tmp_path, "float16"))
    ids = np.arange(12)[None] * 5
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(12)[None],
    }
    for value in model.session.get_inputs()[3:]:
        feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float16)
    logits = model.session.run(["logits"], feeds)[0].astype(np.float32)
    expected = source_logits(folder, ids, np.ones_like(ids))
    assert np.abs(logits - expected).max() <= 2e-2 * np.abs(expected).max()


def edited_folder(tmp_path: Path, family: str, **changes: Any) -> Path:
    folder = tmp_path / "folder"
    shutil.copytree(tiny_folder(family), folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized .gptq."),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"type": "longrope"}}, "'longrope'"),
    ],
)
def test_configurations_that_cannot_be_exported_say_why(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = edited_folder(tmp_path, "llama", **changes)
    with pytest.raises(ExportError, match=message) as caught:
        export_huggingface(folder, tmp_path / "work", HuggingFaceOptions())
    assert "\n" not in str(caught.value)


def test_no_configuration_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"config\.json cannot be read"):
        export_huggingface(tmp_path, tmp_path, HuggingFaceOptions())


def test_refusals_of_the_worker_reach_the_caller(tmp_path: Path) -> None:
    folder = save_random("gptj", tmp_path / "folder", n_head=4, rotary_dim=4)
    with pytest.raises(RefusedError, match="do not call transformers' attention"):
        export_huggingface(folder, tmp_path / "work", HuggingFaceOptions())


@pytest.mark.parametrize(
    ("script", "message"),
    [("kill -SEGV $$", "SIGSEGV while starting"), ("echo some reason >&2; exit 3", "some reason")],
)
def test_a_worker_that_dies_is_an_error(
    script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(ExportError, match=message):
        export_huggingface(tiny_folder("llama"), tmp_path / "work", HuggingFaceOptions())


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ExportError, match=r"needs torch, .*trianglemix\[hf\]"):
        export_huggingface(tiny_folder("llama"), tmp_path, HuggingFaceOptions())
