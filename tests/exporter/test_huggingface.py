"""A Hugging Face folder becomes a graph of dense operator nodes with transformers' own logits."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import chunked_causal_mask_function
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.errors import TriangleMixError
from trianglemix.custom_ops.function_body import build_function
from trianglemix.exporter import torch_attention
from trianglemix.exporter.errors import ExportError, RefusedError
from trianglemix.exporter.huggingface import HuggingFaceOptions, export_huggingface
from trianglemix.exporter.torch_attention import classify_mask, refuse_unknown
from trianglemix.exporter.torch_graph import refuse_frozen_values
from trianglemix.exporter.torch_refusals import refuse_moving_rope, rope_types_of_model
from trianglemix.exporter.torch_worker import export_model

from tests.tiny_models import FOLDER_FAMILIES, tiny_folder

Array = np.ndarray[Any, Any]
LENGTH = 40  # longer than gemma2's window of 24
OWN_WINDOW = {"gemma2": 24}


@dataclass(frozen=True)
class Exported:
    """A folder, its ONNX graph, and a session in which ONNX Runtime inlines the function."""

    folder: Path
    graph: ir.Graph
    session: ort.InferenceSession


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    return {}


def export_here(folder: Path, work: Path, dtype: str = "auto") -> Path:
    """What `export_huggingface` does in its worker, without a process of its own."""
    path = work / "model.onnx"
    export_model(folder, path, dtype, lambda name: None)
    return path


def export(family: str, made: dict[str, Exported], work: Path) -> Exported:
    if family not in made:
        folder = tiny_folder(family)
        made[family] = open_model(folder, export_here(folder, work))
    return made[family]


def open_model(folder: Path, path: Path) -> Exported:
    model = ir.load(path)
    function = build_function()
    model.functions[function.identifier()] = function
    model.opset_imports[contract.DOMAIN] = contract.OP_VERSION
    standalone = path.with_name("standalone.onnx")
    ir.save(model, standalone, external_data="standalone.data")
    session = ort.InferenceSession(standalone, providers=["CPUExecutionProvider"])
    return Exported(folder, ir.load(path).graph, session)


def run(session: ort.InferenceSession, ids: Array, mask: Array, splits: list[int]) -> Array:
    """Logits `[B, S, V]` of one prompt, in chunks that end at `splits`, the cache handed on."""
    positions = (mask.cumsum(1) - 1).clip(min=0)
    cache = {
        value.name: np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    chunks, start = [], 0
    for end in splits:
        feeds = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end]}
        if "position_ids" in {value.name for value in session.get_inputs()}:
            feeds["position_ids"] = positions[:, start:end]
        logits, *present = session.run(None, feeds | cache)
        cache = dict(zip(cache, present, strict=True))
        chunks.append(logits)
        start = end
    return np.concatenate(chunks, 1)


def source_logits(folder: Path, ids: Array, mask: Array) -> Array:
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    positions = (mask.cumsum(1) - 1).clip(min=0)
    with torch.no_grad():
        logits: Array = model(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions),
        ).logits.numpy()
    return logits


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
    nodes = [node for node in graph if node.op_type == contract.OP_TYPE]
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4}, "lacks 9 weights"),
        ({"model_type": "no_such_model"}, "no_such_model"),
    ],
)
def test_folders_that_cannot_be_loaded_say_why(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = edited_folder(tmp_path, "llama", **changes)
    with pytest.raises(ExportError, match=message) as caught:
        export_here(folder, tmp_path / "work")
    assert "\n" not in str(caught.value)


def test_no_configuration_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"config\.json cannot be read"):
        export_huggingface(tmp_path, tmp_path, HuggingFaceOptions())


def save_random(family: str, folder: Path, **config: Any) -> Path:
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2)
    made = AutoConfig.for_model(family, **(sizes | config))
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("llama", {"head_dim": 12}, "head_size is 12"),
        ("gpt_oss", {"head_dim": 16, "num_local_experts": 4}, "s_aux"),
        ("gpt_oss", {"head_dim": 16, "num_local_experts": 4}, "attention sinks of the softmax"),
        ("bloom", {"n_head": 4}, r"layers \[0, 1\] of BloomForCausalLM compute attention in code"),
        ("gptj", {"n_head": 4, "rotary_dim": 4}, "make its ONNX file with another exporter"),
        ("mamba", {"state_size": 8}, "are linear_attention, which keeps a state of its own"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layer 0 of Lfm2ForCausalLM is conv"),
        ("mixtral", {"num_local_experts": 4}, "is a mixture of experts"),
        ("llama4_text", {"num_local_experts": 2, "attention_chunk_size": 8}, "chunks of 8 tokens"),
        ("roberta", {"is_decoder": True}, "does not count the positions"),
        ("doge", {}, r"computes with its attention mask \(dtype\)"),
        ("openai-gpt", {"n_layer": 2, "n_head": 4, "n_embd": 32}, "in code of their own, or none"),
    ],
)
def test_models_with_other_attention_are_refused(
    family: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = save_random(family, tmp_path / "folder", **config)
    with pytest.raises(TriangleMixError, match=message) as caught:
        export_here(folder, tmp_path / "work")
    assert "\n" not in str(caught.value)


def test_refusals_of_the_worker_reach_the_caller(tmp_path: Path) -> None:
    folder = save_random("bloom", tmp_path / "folder", n_head=4)
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


def test_masks_of_another_class_are_refused() -> None:
    def blockwise(_b: Any, _h: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (j <= i) & (i // 2 == j // 2)

    def of_tokens(_b: Any, _h: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (j <= i) & (torch.zeros(2)[j] == 0)

    for function in (blockwise, of_tokens):
        for window in (None, 4):
            mask = classify_mask(mask_function=function, local_size=window)
            assert mask.unknown == "an unknown mask"
            with pytest.raises(RefusedError, match="neither causal nor a sliding window"):
                refuse_unknown(0, torch.nn.Linear(1, 1), mask, {})
    chunked = classify_mask(
        mask_function=chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)),
        local_size=4,
    )
    assert chunked.unknown == "chunked attention (chunks of 4 tokens)"


def test_masks_that_nothing_uses_are_let_through(tmp_path: Path) -> None:
    """A decoder taken out of an encoder-decoder model makes a mask for an encoder, too."""
    sizes = dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=40)
    assert_right(save_random("bart", tmp_path / "folder", **sizes), tmp_path / "work")


@pytest.mark.parametrize(
    ("family", "config"),
    [
        # keys of 24, values of 16, latents in transformers' own cache
        ("deepseek_v3", dict(qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
            | dict(kv_lora_rank=12, q_lora_rank=20, first_k_dense_replace=2)
            | dict(num_key_value_heads=4)),
        # xIELU needs expm1
        ("apertus", dict(head_dim=8)),
        # layers that reuse keys and values, embeddings of each layer's own
        ("gemma3n_text", dict(head_dim=16, num_kv_shared_layers=2, num_hidden_layers=4)
            | dict(layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=8)
            | dict(vocab_size_per_layer_input=61, hidden_size_per_layer_input=8, laurel_rank=8)
            | dict(activation_sparsity_pattern=[0.0] * 4, intermediate_size=[40] * 4)),
    ],
)  # fmt: skip
def test_what_families_need_beyond_plain_attention(
    family: str, config: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_random(family, tmp_path / "folder", **config, pad_token_id=0)
    assert_right(folder, tmp_path / "work")


def assert_right(folder: Path, work: Path) -> None:
    model = open_model(folder, export_here(folder, work))
    ids = np.random.default_rng(3).integers(3, 61, (2, LENGTH))
    mask = np.ones_like(ids)
    expected = source_logits(model.folder, ids, mask)
    logits = run(model.session, ids, mask, [29, LENGTH])
    assert np.abs(logits - expected).max() <= 2e-4 * np.abs(expected).max()


def test_a_moving_rotary_embedding_that_config_json_does_not_name_is_refused() -> None:
    """The class's own default, or a layer type's, decides what is loaded."""

    class Rotary(torch.nn.Module):
        rope_type: Any = None

    model = torch.nn.Sequential(Rotary(), Rotary())
    refuse_moving_rope(rope_types_of_model(model))
    model[1].rope_type = {"full_attention": "longrope", "sliding_attention": "default"}
    with pytest.raises(RefusedError, match="'longrope'"):
        refuse_moving_rope(rope_types_of_model(model))


def test_decisions_by_equal_shapes_are_followed_and_by_lengths_are_not() -> None:
    def equal(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        if x.shape[1] == y.shape[1]:
            return x
        return y

    def long(x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > 4096:
            return x + 1
        return x

    with refuse_frozen_values():
        torch.jit.trace(equal, torch.ones(2, 3))
    with pytest.raises(RefusedError, match="decides by its input"), refuse_frozen_values():
        torch.jit.trace(long, torch.ones(2, 3))


def test_values_that_tracing_would_freeze_are_refused() -> None:
    def decides(x: torch.Tensor) -> torch.Tensor:
        return x * (2 if x.sum() > 0 else 3)

    with (
        pytest.raises(RefusedError, match=r"decides by its input at test_huggingface\.py"),
        refuse_frozen_values(),
    ):
        torch.jit.trace(decides, torch.ones(2))


@pytest.mark.parametrize("family", ["cohere", "glm"])
def test_interleaved_rotary_embeddings_keep_their_sizes_dynamic(
    family: str, tmp_path: Path
) -> None:
    """torch's own form of `repeat_interleave` crashes on the one and freezes sizes in the other."""
    folder = save_random(
        family, tmp_path / "folder", hidden_size=64, head_dim=16, pad_token_id=0, eos_token_id=1
    )
    model = open_model(folder, export_here(folder, tmp_path / "work"))
    ids = np.random.default_rng(3).integers(0, 61, (2, LENGTH))
    mask = np.ones_like(ids)
    expected = source_logits(folder, ids, mask)
    logits = run(model.session, ids, mask, [29, LENGTH])
    assert np.abs(logits - expected).max() <= 2e-4 * np.abs(expected).max()


def test_a_traced_graph_with_a_frozen_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def frozen(g: Any, x: Any, *_: Any) -> Any:
        return g.op("Expand", x, g.op("Constant", value_t=torch.tensor([2, 3, 8])))

    monkeypatch.setattr(torch_attention, "_repeat_last_axis", frozen)
    folder = save_random(
        "glm", tmp_path / "folder", hidden_size=64, head_dim=16, pad_token_id=0, eos_token_id=1
    )
    with pytest.raises(RefusedError, match="the traced graph"):
        export_here(folder, tmp_path / "work")
