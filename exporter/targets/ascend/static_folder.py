"""Writes an Ascend folder: static graphs, shared weights, manifest, script for atc."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import onnx_ir as ir
from onnx_ir.passes import common
from trianglemix.exporter.errors import ExportError, RefusedError
from trianglemix.exporter.onnx_file.model_file import Progress
from trianglemix.exporter.targets.ascend import build_script, static_plan
from trianglemix.exporter.targets.ascend.cost_model import (
    CostModel,
    choose_block,
    choose_dense_block,
)
from trianglemix.exporter.targets.ascend.custom_operator import CUSTOM_OPERATOR, check_custom
from trianglemix.exporter.targets.ascend.dequantize import DequantizePass
from trianglemix.exporter.targets.ascend.lint import lint_file
from trianglemix.exporter.targets.ascend.lint_model import Finding, LengthAxes, Severity
from trianglemix.exporter.targets.ascend.lower_opset import LowerOpsetPass
from trianglemix.exporter.targets.ascend.options import AscendRequest
from trianglemix.exporter.targets.ascend.soc import Soc, find_soc
from trianglemix.exporter.targets.ascend.standard_ops import SpellOutPass
from trianglemix.exporter.targets.ascend.static_graph import (
    LayerGeometry,
    MakeStaticPass,
    read_layers,
)
from trianglemix.exporter.targets.ascend.static_plan import GraphKind, StaticPlan
from trianglemix.exporter.targets.ascend.static_shapes import FoldStaticShapesPass, static_shape
from trianglemix.exporter.targets.ascend.weight_files import WeightFiles, inline_small_weights
from trianglemix.manifest.manifest import RUNS, LayerCache, Manifest
from trianglemix.manifest.static_graphs import StaticGraph, StaticGraphs, StaticTensor

_NOT_IN_NUMPY: Final = {ir.DataType.BFLOAT16: "bfloat16"}
_DEFAULT_LENGTH: Final = 8192
_MATRIX_RANK: Final = 2


@dataclass(frozen=True)
class AscendModel:
    """A canonical graph and what an Ascend folder of it will be made of."""

    model: ir.Model
    layers: tuple[LayerGeometry, ...]
    plan: StaticPlan
    soc: Soc
    cost: CostModel
    dequantized: int  # nodes that had quantized weights


def plan_folder(model: ir.Model, manifest: Manifest, request: AscendRequest) -> AscendModel:
    """Chooses sizes: blocks by the cost model unless they were asked for.

    Raises:
        ExportError: an unknown chip, sizes that do not fit each other or the model's context.
        RefusedError: the source has no KV cache, or computes otherwise beyond some length.
    """
    dequantize = DequantizePass()
    dequantize(model)
    soc = find_soc(request.soc)
    layers = tuple(read_layers(model, manifest.cache))
    slots = _slots(manifest, request)
    for number in manifest.length_switches:
        if number < slots:
            raise RefusedError(
                f"the model computes otherwise beyond {number} tokens, which static graphs, that "
                f"read a prompt in chunks, cannot; give --max-length {number} or less"
            )
    chunk = min(request.chunk, slots)
    last = min(manifest.pattern.num_last_tokens, slots)
    itemsize = int(layers[0].dtype.itemsize)
    attentions = [layer.attention for layer in layers]
    cost = CostModel(attentions, itemsize, _weight_elements(model), slots, chunk)
    if request.lowering == "custom":
        check_custom(soc, ((layer.dtype, layer.attention.shape) for layer in layers))
        plan = StaticPlan(slots, chunk, last, chunk, chunk, "custom")
    else:
        block = request.block or choose_block(cost, slots, soc)
        plan = StaticPlan(slots, chunk, last, block, choose_dense_block(cost))
    return AscendModel(model, layers, plan, soc, cost, dequantize.count)


def write_folder(
    ascend: AscendModel, manifest: Manifest, folder: Path, progress: Progress
) -> tuple[Manifest, list[str]]:
    """Writes all but the companions and the manifest itself; returns it, and notes.

    Raises:
        RefusedError: a node that atc cannot read, or a graph that cannot be static.
        ExportError: a file cannot be written.
    """
    inline_small_weights(ascend.model)
    weights = WeightFiles(folder, progress)
    graphs: dict[str, StaticGraph] = {}
    notes: list[str] = []
    if ascend.dequantized:
        notes.append(
            f"the quantized weights of {ascend.dequantized} nodes are plain ones here: "
            "no operator that atc reads takes them"
        )
    for kind in GraphKind:
        graph = build_graph(ascend, kind)
        weights.externalize(graph)
        path = folder / ascend.plan.file_name(kind)
        try:
            path.write_bytes(ir.to_proto(graph).SerializeToString(deterministic=True))
        except ValueError as error:
            raise ExportError(f"{path.name} cannot be written: {error}") from error
        notes += _checked(path, ascend)
        graphs[kind.value] = _describe(graph, path, ascend.plan.call(kind).rows)
    static = StaticGraphs(
        soc=ascend.soc.name,
        slots=ascend.plan.slots,
        start=static_plan.START,
        length=static_plan.LENGTH,
        weights_sha256=weights.sha256,
        lowering=ascend.plan.lowering,
        custom_operator=CUSTOM_OPERATOR if ascend.plan.lowering == "custom" else None,
        **graphs,
    )
    script = build_script.build_script(static)
    (folder / build_script.FILE_NAME).write_text(script, encoding="utf-8")
    (folder / build_script.FILE_NAME).chmod(0o755)
    notes.append(
        f"{len(graphs)} static graphs for {ascend.soc.name} share {weights.total_bytes >> 20} MiB "
        f"of weights: cache {ascend.plan.slots} tokens, chunk {ascend.plan.chunk}, "
        f"{_attention_note(ascend.plan)}; never converted by atc here: run build_om.sh"
    )
    return _manifest(manifest, ascend, static), notes


def build_graph(ascend: AscendModel, kind: GraphKind) -> ir.Model:
    """One static graph in standard operators at an opset that atc reads.

    Raises:
        RefusedError: see `MakeStaticPass`, `FoldStaticShapesPass` and `LowerOpsetPass`.
    """
    model = ascend.model.clone()
    SpellOutPass()(model)
    make = MakeStaticPass(kind, ascend.plan)
    make(model)
    sizes = make.input_sizes(list(ascend.layers))
    FoldStaticShapesPass(sizes)(model)
    for step in (
        common.RemoveUnusedNodesPass(),
        LowerOpsetPass(),
        common.RemoveUnusedOpsetsPass(),
        common.NameFixPass(),
    ):
        step(model)
    return model


def _attention_note(plan: StaticPlan) -> str:
    if plan.lowering == "custom":
        return f"attention as a custom operator ({CUSTOM_OPERATOR})"
    return f"blocks of {plan.banded_block} rows"


def _slots(manifest: Manifest, request: AscendRequest) -> int:
    context = manifest.context_length
    if request.max_length is None:
        return min(context or _DEFAULT_LENGTH, _DEFAULT_LENGTH)
    if context is not None and request.max_length > context:
        raise ExportError(
            f"--max-length is {request.max_length}, but the model's context has {context} tokens"
        )
    needed = manifest.pattern.num_sink_tokens + manifest.pattern.num_last_tokens
    if request.max_length < needed:
        raise ExportError(
            f"--max-length is {request.max_length}, but sinks and last rows alone are {needed}"
        )
    return request.max_length


def _weight_elements(model: ir.Model) -> int:
    """Elements of the matrices that rows are multiplied by; embeddings are looked up only."""
    return sum(
        int(value.const_value.size)
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and len(value.const_value.shape) >= _MATRIX_RANK
        and any(node.op_type in ("MatMul", "Gemm", "Transpose") for node in value.consumers())
    )


def _checked(path: Path, ascend: AscendModel) -> list[str]:
    """Lints a written graph: an error ends the export, a warning becomes a note."""
    found = lint_file(path, ascend.soc, _length_axes(ascend))
    errors = [finding for finding in found if finding.severity is Severity.ERROR]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise RefusedError(f"{path.name} would not pass atc: {_short(errors[0])}{more}")
    return [
        f"{path.name}: {_short(finding)}"
        for finding in found
        if finding.severity is Severity.WARNING
    ]


def _length_axes(ascend: AscendModel) -> LengthAxes | None:
    """None where a chunk is as long as the cache: its rows by its keys are then meant."""
    if ascend.plan.slots <= max(ascend.plan.chunk, ascend.plan.last):
        return None
    return LengthAxes(ascend.plan.slots, frozenset(_own_sizes(ascend)))


def _own_sizes(ascend: AscendModel) -> Iterator[int]:
    """Sizes of weights and of packed rows: a cache of as many slots could not be told from them."""
    for kind in GraphKind:
        call = ascend.plan.call(kind)
        for layer in ascend.layers:
            heads = layer.attention.shape.num_heads // layer.attention.shape.kv_num_heads
            yield from (heads * call.banded_block, heads * call.dense_block)
    for value in ascend.model.graph.initializers.values():
        if value.const_value is not None:
            yield from (int(size) for size in value.const_value.shape.numpy())


def _short(finding: Finding) -> str:
    return f"{finding.place}: {finding.message} [{finding.rule}: {finding.source}]"


def _describe(graph: ir.Model, path: Path, rows: int) -> StaticGraph:
    return StaticGraph(
        file=path.name,
        rows=rows,
        inputs=tuple(_tensor(value) for value in graph.graph.inputs),
        outputs=tuple(_tensor(value) for value in graph.graph.outputs),
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def _tensor(value: ir.Value) -> StaticTensor:
    shape = static_shape(value)
    assert shape is not None, f"{value.name} has no static shape"
    assert value.dtype is not None, f"{value.name} has no type"
    dtype = _NOT_IN_NUMPY.get(value.dtype) or str(value.dtype.numpy())
    return StaticTensor(str(value.name), dtype, shape)


def _manifest(manifest: Manifest, ascend: AscendModel, static: StaticGraphs) -> Manifest:
    return replace(
        manifest,
        model_file=static.stream.file,
        input_ids=static_plan.INPUT_IDS,
        attention_mask=None,
        position_ids=None,
        prompt_length=None,
        logits=static_plan.LOGITS,
        last_token_logits=True,
        cache=tuple(
            _cache(layer, geometry)
            for layer, geometry in enumerate(ascend.layers)
            if geometry.owner == layer
        ),
        shared_cache=False,
        left_padding=False,
        context_length=ascend.plan.slots,
        static=static,
        inputs=(),
        outputs=(),
        runtime=RUNS,
    )


def _cache(layer: int, geometry: LayerGeometry) -> LayerCache:
    shape = geometry.attention.shape
    return LayerCache(
        layer,
        *static_plan.cache_names(layer),
        *static_plan.new_names(layer),
        shape.kv_num_heads,
        shape.head_size,
        shape.value_head_size,
    )
