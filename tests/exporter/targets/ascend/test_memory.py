"""A chunk's memory does not grow with the prompt, and no tensor is square in a length."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
import pytest
from trianglemix.exporter.options import ExportOptions, LayerRequest
from trianglemix.exporter.pipeline import export
from trianglemix.exporter.sources.huggingface.run_worker import (
    HuggingFaceOptions,
    export_huggingface,
)
from trianglemix.exporter.targets.ascend.lint_model import LintModel
from trianglemix.exporter.targets.ascend.options import AscendRequest
from trianglemix.manifest.static_graphs import Lowering

from tests.exporter.targets.ascend.exported import PATTERN, Silent, tiny_source
from tests.exporter.targets.ascend.half_model import save_half
from tests.exporter.targets.ascend.peak_memory import LONG, SHORT, export_for, long_source, measure
from tests.tiny_models import tiny_folder

SLOTS = 1000  # no other size, nor its double, is near it
CHUNK = 32
_NOISE = 8.0
"""MiB that a process's peak varies by, the token ids of a long prompt among them."""


def sizes_of(folder: Path) -> dict[str, int]:
    """Elements of every tensor of every graph, after shape inference, by where it is read or made:
    names of constants tell their numbers.
    """
    sizes = {}
    for file in sorted(folder.glob("*.onnx")):
        model = LintModel(onnx.load(file, load_external_data=False))
        for number, node in enumerate(model.nodes):
            for place, name in enumerate((*node.input, *node.output)):
                if not name:
                    continue
                info = model.infos[name]  # every tensor has a shape: none is left out
                assert info.is_static, f"{file.name}: {name} has no static shape"
                size = math.prod(dim for dim in info.dims or () if dim)
                sizes[f"{file.stem}/{number}/{node.op_type}/{place}"] = size
    return sizes


def export_slots(source: Path, output: Path, slots: int, lowering: Lowering, dense: bool) -> Path:
    options = ExportOptions(
        source,
        output,
        target="ascend",
        layers=LayerRequest() if dense else LayerRequest(layers=(1,)),
        pattern=PATTERN,
        dense=dense,
        settings=AscendRequest("Ascend910B3", CHUNK, slots, None, lowering),
    )
    export(options, Silent())
    return output


@pytest.mark.parametrize(
    ("family", "route", "lowering", "dense"),
    [
        ("qwen3", "gqa", "block", False),
        ("qwen3", "gqa", "custom", False),
        ("qwen3", "gqa", "block", True),
        ("llama", "torchscript-18", "block", False),
        ("gemma2", "folder", "block", False),
    ],
)
def test_twice_the_cache_at_most_doubles_a_tensor(
    family: str, route: str, lowering: Lowering, dense: bool, tmp_path: Path
) -> None:
    """A tensor with two axes of the cache's length would grow four times."""
    if route == "folder":  # made once: it takes seconds
        source = export_huggingface(tiny_folder(family), tmp_path / "onnx", HuggingFaceOptions())
    else:
        source = tiny_source(family, route)
    if lowering == "custom":
        source = save_half(source, tmp_path / "half" / "model.onnx")
    once, twice = (
        sizes_of(export_slots(source, tmp_path / str(slots), slots, lowering, dense))
        for slots in (SLOTS, 2 * SLOTS)
    )
    assert once.keys() == twice.keys()
    growing = {name for name in once if twice[name] > once[name]}
    assert growing, "nothing grows: the cache is not in these graphs"
    assert all(twice[name] <= 2 * once[name] for name in growing)


def test_a_square_tensor_would_be_seen(tmp_path: Path) -> None:
    """The comparison above can fail."""
    sizes = []
    for slots in (SLOTS, 2 * SLOTS):
        dims = [1, slots, slots]
        value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, dims)
        out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, dims)
        node = onnx.helper.make_node("Neg", ["x"], ["y"])
        graph = onnx.helper.make_graph([node], "square", [value], [out])
        folder = tmp_path / str(slots)
        folder.mkdir()
        onnx.save(onnx.helper.make_model(graph), folder / "tail.onnx")
        sizes.append(sizes_of(folder))
    assert sizes[1]["tail/0/Neg/0"] > 2 * sizes[0]["tail/0/Neg/0"]


def test_peak_memory_of_a_chunk_grows_by_the_cache_alone(tmp_path: Path) -> None:
    """Measured, in processes of their own: prompts of 2,048 and 16,384 tokens, chunk 128."""
    source, every = long_source(tmp_path / "source"), LayerRequest(start_layer=0)
    small = export_for(source, tmp_path / "small", SHORT, "block", every)
    large = export_for(source, tmp_path / "large", LONG, "block", every)
    first, last = measure(small, SHORT, "stream"), measure(large, LONG, "stream")
    assert last.peak - first.peak <= last.cache - first.cache + _NOISE
    same_cache = measure(large, SHORT)
    assert abs(measure(large, LONG).peak - same_cache.peak) <= _NOISE
