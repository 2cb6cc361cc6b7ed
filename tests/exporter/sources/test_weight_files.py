"""Folders whose weights are not whole, or not those of their configuration, say which and why."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from trianglemix.analysis.errors import AnalysisError
from trianglemix.analysis.model import load_model
from trianglemix.custom_ops.errors import ConfigurationError, TriangleMixError, WeightsError
from trianglemix.evaluation.huggingface import shape_of_folder
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.report.export_report import FILE_NAME
from trianglemix.exporter.sources.huggingface.run_worker import (
    HuggingFaceOptions,
    export_huggingface,
)
from trianglemix.hf.weight_files import check_weight_files

from source_models.tiny_tokenizer import save_tokenizer
from tests.exporter.exports import export_to
from tests.exporter.sources.huggingface_folders import export_here, save_random

POINTER: Final = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 1234\n"
SAFE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
PICKLED: Final = "pytorch_model.bin"
Change = Callable[[Path], Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_random("llama", tmp_path / "folder", tie_word_embeddings=False)


def write(name: str, content: str | bytes) -> Change:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str) -> Change:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def rename(name: str) -> Change:
    return lambda folder: (folder / SAFE).rename(folder / name)


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def configure(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def weights(**changes: torch.Tensor | None) -> Change:
    """Sets weights (`None` takes them away); `__` in a name is a dot."""

    def change(folder: Path) -> None:
        held = load_file(folder / SAFE)
        for name, tensor in changes.items():
            held.pop(name.replace("__", "."), None)
            if tensor is not None:
                held[name.replace("__", ".")] = tensor
        save_file(held, folder / SAFE, {"format": "pt"})

    return change


def shard(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / SAFE).unlink()
    model.save_pretrained(folder, max_shard_size="20KB")


def pickle(folder: Path) -> None:
    torch.save(load_file(folder / SAFE), folder / PICKLED)
    (folder / SAFE).unlink()


def pickle_of_code(folder: Path) -> None:
    torch.save({"weight": os.getcwd}, folder / PICKLED)
    (folder / SAFE).unlink()


def link_to_nothing(folder: Path) -> None:
    (folder / SAFE).unlink()
    (folder / SAFE).symlink_to("gone")


PART: Final = "model-00002-of-00005.safetensors"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([remove(SAFE)], f"holds no weights: none of {SAFE}, {INDEX}, {PICKLED}, .* is a file"),
        ([rename("model.gguf")], r"holds no weights: .*\(only model.gguf\)"),
        ([rename("consolidated.safetensors")], r"\(only consolidated.safetensors\)"),
        ([link_to_nothing], r"\(only model.safetensors \(a broken link\)\)"),
        ([write(SAFE, POINTER)], f"{SAFE} is a Git LFS pointer, .*git lfs pull"),
        ([cut(SAFE)], f"{SAFE} is cut off or broken: it has .* bytes of "),
        ([write(SAFE, b"")], rf"{SAFE} \(0 bytes\) is cut off"),
        ([write(SAFE, b"<html>" * 99)], rf"{SAFE} \(594 bytes\) is cut off, or no safetensors"),
        ([shard, remove(PART)], f"{INDEX} names 5 files of weights, of which 1 .*: {PART}; "),
        ([shard, write(PART, POINTER)], f"{PART} is a Git LFS pointer"),
        ([shard, cut(PART)], f"{PART} is cut off"),
        ([shard, remove(INDEX)], "holds no weights: .*only model-00001-of-00005.safetensors, "),
        ([shard, write(INDEX, "{")], f"{INDEX} is no index of files"),
        ([shard, write(INDEX, "{}")], f"{INDEX} is no index of files"),
        ([shard, write(INDEX, POINTER)], f"{INDEX} is a Git LFS pointer"),
        ([pickle, write(PICKLED, POINTER)], f"{PICKLED} is a Git LFS pointer"),
        ([pickle, cut(PICKLED)], f"{PICKLED} is cut off, or no file of torch.save"),
        ([write("adapter_config.json", "{}")], "holds an adapter"),
        (
            [weights(lm_head__weight=torch.ones(61, 32, dtype=torch.int8))],
            r"lm_head\.weight in .* is stored as whole numbers \(I8\)",
        ),
    ],
)
def test_weights_that_are_not_whole(changes: list[Change], message: str, folder: Path) -> None:
    for change in changes:
        change(folder)
    with pytest.raises(WeightsError, match=message) as caught:
        export_huggingface(folder, folder.parent / "work", HuggingFaceOptions())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [[], [shard], [pickle]])
def test_whole_weights_pass(changes: list[Change], folder: Path) -> None:
    for change in changes:
        change(folder)
    check_weight_files(folder)


NORM: Final = "model__layers__1__input_layernorm__weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (configure(num_hidden_layers=4), "lacks 18 weights .*random; give a complete folder"),
        (weights(**{NORM: None}), r"lacks the weight model\.layers\.1\.input_layernorm\.weight"),
        (weights(lm_head__weight=None), r"lacks the weight lm_head\.weight"),
        (configure(num_key_value_heads=4), r"layers\.0\.self_attn\.k_proj\.weight in .* \[16, 32\]"
         r", but config\.json makes it \[32, 32\]"),
        (configure(vocab_size=80), r"\[61, 32\], but config\.json makes it \[80, 32\]"),
        (configure(num_key_value_heads=3), "= 3, which does not divide num_attention_heads = 4"),
        (configure(num_key_value_heads=0), "num_key_value_heads = 0, but"),
        (configure(num_attention_heads=0), "num_attention_heads = 0, but"),
        (configure(num_hidden_layers=0), "num_hidden_layers = 0, but"),
        (configure(num_attention_heads=5, num_key_value_heads=5), "multiple of .*its config.json"),
        (configure(head_dim="8"), "'head_dim' expected int.*check the numbers"),
        (configure(hidden_act="unheard_of"), "'unheard_of'; check the numbers and names in its"),
        (configure(model_type="unheard_of"), "model_type 'unheard_of', which transformers"),
        (configure(model_type="vit"), "no causal language model for the model_type 'vit'"),
        (configure(model_type="unheard_of", auto_map={"AutoConfig": "a.B"}), "code of its own"),
        (pickle_of_code, r"cannot be read \(UnpicklingError\)"),
        (weights(**{NORM: torch.full((32,), float("nan"))}), r"no finite numbers, .*weight model\."
         r"layers\.1\.input_layernorm\.weight holds"),
    ],
)  # fmt: skip
def test_weights_that_are_another_models(change: Change, message: str, folder: Path) -> None:
    change(folder)
    with pytest.raises(TriangleMixError, match=message) as caught:
        export_here(folder, folder.parent)
    assert "\n" not in str(caught.value)
    assert "another torch" not in str(caught.value)


def test_a_pointer_in_place_of_the_configuration(folder: Path) -> None:
    write("config.json", POINTER)(folder)
    with pytest.raises(ExportError, match="a Git LFS pointer"):
        export_huggingface(folder, folder.parent / "work", HuggingFaceOptions())


def test_weights_that_are_left_out_are_told(folder: Path) -> None:
    configure(num_hidden_layers=1)(folder)
    report = export_to(folder, folder.parent / "out", dense=True)
    assert [warning for warning in report.warnings if "has no use for 9 weights (" in warning]
    saved = json.loads((folder.parent / "out" / FILE_NAME).read_text())
    assert "config.json counts 1 layers, but the weights go on to layer 1" in saved["warnings"][0]


def test_what_an_architecture_leaves_out_itself_is_not_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))(folder)
    export_here(folder, folder.parent)
    assert not caplog.messages
    configure(auto_map={"AutoModelForCausalLM": "modeling.Model"})(folder)
    export_here(folder, folder.parent)
    assert "LlamaForCausalLM is exported in its place" in caplog.messages[0]


def test_the_analysis_reads_no_random_weights(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(folder)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights(**{NORM: None})(broken)
    assert load_model(folder, "cpu", "float32").fingerprint.num_layers == 2
    with pytest.raises(WeightsError, match="lacks the weight"):
        load_model(broken, "cpu", "float32")
    configure(num_attention_heads=5, num_key_value_heads=5)(broken)
    with pytest.raises(AnalysisError, match=r"validate_architecture.*multiple of"):
        load_model(broken, "cpu", "float32")
    with pytest.raises(ConfigurationError, match=r"validate_architecture.*multiple of"):
        shape_of_folder(broken)
