"""Where a graph does less than its configuration says, the user is told, and told the truth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from trianglemix.exporter.attention.sites import AttentionSite, MaskClass, MatchContext, find_sites
from trianglemix.exporter.configuration.config_check import check_config
from trianglemix.exporter.configuration.rotary_factors import rotaries
from trianglemix.exporter.graph.roles import find_roles
from trianglemix.exporter.inspection import inspect_model
from trianglemix.exporter.options import layer_ranges
from trianglemix.exporter.patterns.attention import PATTERN
from trianglemix.exporter.sources.companions import Companions
from trianglemix.manifest.manifest import Manifest

from tests.exporter.exports import export_to, save_example

CONFIG: dict[str, Any] = {
    "model_type": "mistral", "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 64,
    "max_position_embeddings": 4096, "rope_theta": 10000.0, "sliding_window": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def sites() -> tuple[AttentionSite, ...]:
    graph = PATTERN.example().model.graph
    return find_sites(MatchContext(graph, find_roles(graph)), [PATTERN]).found


def _warnings(
    folder: Path,
    sites: Sequence[AttentionSite],
    config: dict[str, Any],
    constants: dict[str, NDArray[Any]] | None = None,
    name: str = "config.json",
) -> tuple[str, int | None]:
    """The warnings, and the context, of a graph that holds these constants."""
    (folder / name).write_text(json.dumps(config))
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21})
    for key, array in (constants or {}).items():
        graph.initializers[key] = ir.Value(name=key, const_value=ir.tensor(array, name=key))
    check = check_config(graph, sites, Companions((folder,)))
    return "\n".join(check.warnings), check.context_length


def _sliding(sites: Sequence[AttentionSite], *windows: int | None) -> list[AttentionSite]:
    return [replace(s, mask=MaskClass(w)) for s, w in zip(sites, windows, strict=True)]


@pytest.mark.parametrize(
    ("config", "windows", "expected"),
    [
        ({"sliding_window": 24}, (24, 24, 24), None),
        ({"sliding_window": 24}, (None,) * 3,
         "a sliding window of 24 tokens in layers 0-2, but the graph attends causally there: "
         "beyond 24 tokens"),
        ({"sliding_window": 24}, (24, None, 25), "in layers 2, but the graph slides a window of 2"),
        ({"sliding_window": 24}, (24, None, 25), "in layers 1, but the graph attends causally"),
        ({"sliding_window": 4096}, (None,) * 3, None),  # nothing is further away in the context
        ({"sliding_window": 4095}, (None,) * 3, "beyond 4095 tokens"),
        ({}, (None, None, 9), "full attention in layers 2, but the graph slides a window of 9"),
        ({"model_type": "qwen2", "sliding_window": 24}, (None,) * 3, None),
        ({"model_type": "qwen2", "sliding_window": 24, "use_sliding_window": True,
          "max_window_layers": 2}, (None,) * 3, "in layers 2, but"),
        ({"layer_types": ["chunked_attention"] * 2 + ["full_attention"],
          "attention_chunk_size": 128}, (None,) * 3, "attention within chunks of 128 tokens in "
         "layers 0-1, but the graph attends causally there"),
        ({"model_type": "unheard_of", "sliding_window": 24}, (None,) * 3,
         "names a sliding window of 24 tokens, but no layer"),
        ({"attn_logit_softcapping": 50.0}, (None,) * 3, "caps attention scores at 50"),
    ],
)  # fmt: skip
def test_masks_and_scores(
    config: dict[str, Any],
    windows: tuple[int | None, ...],
    expected: str | None,
    sites: tuple[AttentionSite, ...],
    tmp_path: Path,
) -> None:
    text, context = _warnings(tmp_path, _sliding(sites, *windows), CONFIG | config)
    assert text == "" if expected is None else expected in text
    assert context == 4096


@pytest.mark.parametrize(
    ("config", "difference"),
    [
        ({"num_hidden_layers": 5}, "5 attention layers, the graph 3"),
        ({"num_attention_heads": 8}, "8 heads, the graph 4"),
        ({"num_key_value_heads": 1}, "1 key/value heads, the graph 2"),
        ({"head_dim": 32}, "heads are 32 wide, the graph's 16"),
    ],
)
def test_another_models_configuration(
    config: dict[str, Any], difference: str, sites: tuple[AttentionSite, ...], tmp_path: Path
) -> None:
    text, _ = _warnings(tmp_path, sites, CONFIG | config | {"sliding_window": 24})
    assert f"config.json describes another model: it has {difference}" in text or (
        f"config.json describes another model: its {difference}" in text
    )
    assert "sliding" not in text  # what it says of this graph is worth nothing


def test_nested_and_hybrid_configurations_and_genais(
    sites: tuple[AttentionSite, ...], tmp_path: Path
) -> None:
    nested = {"model_type": "gemma3", "text_config": CONFIG | {"sliding_window": 24}}
    assert "a sliding window of 24" in _warnings(tmp_path, sites, nested)[0]
    hybrid = CONFIG | {"num_hidden_layers": 9, "attn_layer_indices": [1, 4, 7]}
    assert _warnings(tmp_path, sites, hybrid)[0] == ""
    (tmp_path / "config.json").unlink()
    decoder = {"num_hidden_layers": 3, "num_attention_heads": 4, "head_size": 16,
               "sliding_window": {"window_size": 24, "layers": [0, 2]}}  # fmt: skip
    genai = {"model": {"decoder": decoder, "context_length": 99}}
    text, context = _warnings(tmp_path, sites, genai, name="genai_config.json")
    assert "genai_config.json says a sliding window of 24 tokens in layers 0, 2, but" in text
    assert context == 99


LONG = {"rope_type": "longrope", "short_factor": [1.5] * 8, "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 512}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 512}  # fmt: skip
FORMS = ["frequencies", "half table", "whole table", "pairs", "float16 table"]


def _constants(form: str, frequencies: NDArray[np.float64], magnitude: float) -> NDArray[Any]:
    """Frequencies as a graph may hold them."""
    if form == "frequencies":
        return frequencies.astype(np.float32).reshape(1, -1, 1)
    table = magnitude * np.cos(np.arange(2000)[:, None] * frequencies)
    if form == "whole table":
        table = np.concatenate([table, table], axis=1)
    if form == "pairs":
        table = np.repeat(table, 2, axis=1)
    return table.astype(np.float16 if form == "float16 table" else np.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scaling", [LINEAR, YARN, LLAMA3], ids=lambda s: str(s["rope_type"]))
def test_scaling_left_out(
    form: str, scaling: dict[str, Any], sites: tuple[AttentionSite, ...], tmp_path: Path
) -> None:
    config = CONFIG | {"rope_scaling": scaling}
    (rotary,) = rotaries(config, 16)
    unrelated = {"weight": np.ones((2000, 8), np.float32), "norm": np.ones(8, np.float32)}
    right = {"table": _constants(form, rotary.scaled, rotary.magnitude), **unrelated}
    assert _warnings(tmp_path, sites, config, right)[0] == ""
    wrong = {"table": _constants(form, rotary.plain, 1.0), **unrelated}
    text, _ = _warnings(tmp_path, sites, config, wrong)
    assert f"scales rotary frequencies ({rotary.kind}), but the graph holds unscaled" in text
    assert _warnings(tmp_path, sites, config, unrelated)[0] == ""  # nothing to be seen, or said


def test_a_magnitude_left_out(sites: tuple[AttentionSite, ...], tmp_path: Path) -> None:
    config = CONFIG | {"rope_scaling": YARN}
    (rotary,) = rotaries(config, 16)
    text, _ = _warnings(
        tmp_path, sites, config, {"table": _constants("half table", rotary.scaled, 1.0)}
    )
    assert "multiplies rotary factors by 1.2079 (yarn), but the graph by 1" in text


@pytest.mark.parametrize("form", FORMS)
def test_frozen_longrope(form: str, sites: tuple[AttentionSite, ...], tmp_path: Path) -> None:
    config = CONFIG | {"rope_scaling": LONG}
    (rotary,) = rotaries(config, 16)
    assert rotary.long is not None
    short = _constants(form, rotary.scaled, rotary.magnitude)
    long = _constants(form, rotary.long, rotary.magnitude)
    text, context = _warnings(tmp_path, sites, config, {"a": short})
    assert "the graph holds the short ones only: the context is bounded to 512 tokens" in text
    assert context == 512
    text, context = _warnings(tmp_path, sites, config, {"a": long})
    assert "for texts up to 512 tokens" in text
    assert context == 4096
    assert _warnings(tmp_path, sites, config, {"a": short, "b": long}) == ("", 4096)


@pytest.mark.parametrize("form", FORMS)
def test_another_base(form: str, sites: tuple[AttentionSite, ...], tmp_path: Path) -> None:
    (rotary,) = rotaries(CONFIG | {"rope_theta": 5e5}, 16)
    table = {"a": _constants(form, rotary.plain, 1.0)}
    text, _ = _warnings(tmp_path, sites, CONFIG, table)
    assert text.startswith("a holds other rotary frequencies than config.json names")
    assert _warnings(tmp_path, sites, CONFIG | {"rope_theta": 5e5}, table)[0] == ""
    unknown = CONFIG | {"rope_scaling": {"rope_type": "new"}}
    assert _warnings(tmp_path, sites, unknown, table)[0] == ""


def test_frozen_dynamic_scaling(sites: tuple[AttentionSite, ...], tmp_path: Path) -> None:
    config = CONFIG | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    (rotary,) = rotaries(config, 16)
    table = {"a": _constants("frequencies", rotary.plain, 1.0)}
    text, context = _warnings(tmp_path, sites, config, table)
    assert "holds as a constant: it is the model up to 4096 tokens" in text
    assert context == 4096


@pytest.mark.parametrize(("rows", "context"), [(1024, 1024), (4096, 4096), (8192, 4096), (4, 4096)])
def test_tables_of_positions_end_the_context(
    rows: int, context: int, sites: tuple[AttentionSite, ...], tmp_path: Path
) -> None:
    """Where they are shorter than the context; a few rows are no positions."""
    table = ir.Value(name="learned", const_value=ir.tensor(np.zeros((rows, 5), np.float32)))
    positions = ir.Value(name="position_ids")
    gather = ir.node("Gather", [table, positions])
    graph = ir.Graph([positions], [], nodes=[gather], opset_imports={"": 21}, initializers=[table])
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    check = check_config(graph, sites, Companions((tmp_path,)))
    assert check.context_length == context
    said = f"tables of positions end at {rows} tokens" in "\n".join(check.warnings)
    assert said == (context < CONFIG["max_position_embeddings"])
    (tmp_path / "config.json").unlink()
    unknown = check_config(graph, sites, Companions((tmp_path,)))
    assert (unknown.context_length, unknown.warnings) == (rows if rows > 4 else None, ())


def test_it_reaches_report_manifest_and_inspection(tmp_path: Path) -> None:
    source = save_example(PATTERN.example().model, tmp_path / "source")
    config = CONFIG | {"sliding_window": 24, "max_position_embeddings": 300}
    (source.parent / "config.json").write_text(json.dumps(config))
    report = export_to(source, tmp_path / "out", layers=(1,))
    (warning,) = [text for text in report.warnings if "sliding window of 24" in text]
    assert warning in json.loads((tmp_path / "out" / "export_report.json").read_text())["warnings"]
    assert warning in inspect_model(source).warnings
    assert Manifest.load(tmp_path / "out").context_length == 300


def test_another_models_folder_above_is_left_alone(tmp_path: Path) -> None:
    source = save_example(PATTERN.example().model, tmp_path / "models" / "mine")
    (tmp_path / "models" / "tokenizer.json").write_text("{}")
    above = tmp_path / "models" / "config.json"
    above.write_text(json.dumps(CONFIG | {"num_hidden_layers": 32, "max_position_embeddings": 64}))
    report = export_to(source, tmp_path / "out", layers=(1,))
    assert any("describes another model (it has 32" in text for text in report.warnings)
    assert not (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert Manifest.load(tmp_path / "out").context_length is None
    above.write_text(json.dumps(CONFIG))
    report = export_to(source, tmp_path / "again", layers=(1,))
    assert not [text for text in report.warnings if "config" in text]
    assert (tmp_path / "again" / "tokenizer.json").is_file()


def test_layers_in_words() -> None:
    assert layer_ranges([0, 1, 2, 5, 7, 8], ", ") == "0-2, 5, 7-8"
