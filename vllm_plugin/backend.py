"""What our backends have in common: a step is split when it is built, and a layer runs the parts.

`TriangleBuilding` stands before a metadata builder of vLLM, `TriangleForward` before an attention
implementation of vLLM, as bases of one class. Neither changes anything where nothing is configured,
where the layer has no role, or where no row of the step is ours: then vLLM's own code runs on
vLLM's own metadata. Dense rows of a split step run vLLM's own code too, on metadata that vLLM's
builder makes for those rows alone. Layers of two roles split a step in two ways.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.pytorch.block_choice import BlockSparse
from trianglemix.vllm.engine_config import configuration
from trianglemix.vllm.errors import ServingError
from trianglemix.vllm.prompt_lengths import (
    StepLengths,
    ask_for_prompt_lengths,
    step_lengths,
    without_our_window,
)
from trianglemix.vllm.roles import TRIANGLE, Keeps
from trianglemix.vllm.row_split import split_rows
from trianglemix.vllm.segments import SegmentTensors, segment_tensors
from trianglemix.vllm.served_layers import ServedLayer, count_board, prepare_layers
from trianglemix.vllm.sparse_segments import SegmentKernel, attend_gathered, attend_sparse


@dataclass(frozen=True)
class DenseRows:
    """The dense rows of a split step, and vLLM's metadata for them alone."""

    segments: SegmentTensors
    metadata: Any


@dataclass(frozen=True)
class Step:
    """A step in which rows of one role's layers are ours. `dense` is None where every row is."""

    keeps: Keeps
    ours: SegmentTensors
    dense: DenseRows | None
    our_rows: int
    dense_rows: int

    @cached_property
    def sinks(self) -> Tensor:
        """`[segments]` int32: how many keys at its prompt's beginning each of our segments sees."""
        return torch.full_like(self.ours.keys, self.keeps.num_sink_tokens)


class TriangleBuilding:
    """Base of a metadata builder: puts the `Step` of each role on the metadata, as `trianglemix`.

    Roles without a row of their own in the step have none there.
    """

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any
    ) -> None:
        with without_our_window(vllm_config.model_config):
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        config = configuration(vllm_config)
        self._layers: tuple[ServedLayer, ...] = ()
        if config is not None:
            self._board = count_board(vllm_config)
            self._layers = prepare_layers(
                vllm_config, layer_names, kv_cache_spec, config, self._board
            )
        if self._layers:
            ask_for_prompt_lengths(vllm_config.model_config)
            self.supports_update_block_table = False  # a split holds pages of its own

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        """vLLM's metadata, with the step's splits where there are layers with a role."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        if self._layers:
            metadata.trianglemix = self._steps(common_attn_metadata)
            self._board.log_sometimes()
        return metadata

    def build_for_drafting(self, common_attn_metadata: Any, draft_index: int) -> Any:
        """vLLM's metadata: layers that guess tokens never have a role."""
        layers, self._layers = self._layers, ()
        try:
            return super().build_for_drafting(common_attn_metadata, draft_index)  # type: ignore[misc]
        finally:
            self._layers = layers

    def _steps(self, common: Any) -> dict[str, Step]:
        """By role the step of its layers, where some of its rows are ours."""
        lengths = step_lengths(common)
        if lengths is None:
            return {}
        keeps = {layer.role: layer.keeps for layer in self._layers}
        steps = {role: self._split(common, lengths, kept) for role, kept in keeps.items()}
        return {role: step for role, step in steps.items() if step is not None}

    def _split(self, common: Any, lengths: StepLengths, keeps: Keeps) -> Step | None:
        if not lengths.any_are_ours(keeps):
            return None
        split = split_rows(lengths.requests, keeps)
        table = common.block_table_tensor
        ours = segment_tensors(split.ours, table)
        dense = None
        if split.dense:
            segments = segment_tensors(split.dense, table, common.seq_lens)
            dense = DenseRows(segments, self._metadata_of(segments, common))
        return Step(keeps, ours, dense, split.our_rows, split.dense_rows)

    def _metadata_of(self, segments: SegmentTensors, common: Any) -> Any:
        """vLLM's metadata for a step of these segments alone, each as if it were a request.

        `fast_build` keeps it from the buffers of the whole step's schedule.
        """
        slots = segments.rows.take(common.slot_mapping)
        part = {
            "query_start_loc": segments.starts,
            "query_start_loc_cpu": segments.starts_cpu,
            "seq_lens": segments.keys,
            "num_reqs": segments.count,
            "num_actual_tokens": slots.shape[0],
            "max_query_len": segments.longest_rows,
            "max_seq_len": segments.longest_keys,
            "block_table_tensor": segments.table,
            "slot_mapping": slots,
            "causal": True,
        }
        return super().build(0, type(common)(**part), True)  # type: ignore[misc]


class TriangleForward:
    """Base of an attention implementation: in a layer with a role, runs the two parts of a step."""

    served: ServedLayer | None = None
    """What the builder makes of the layer; None: vLLM's own attention in every step."""
    scale: float
    logits_soft_cap: float

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor,
        attn_metadata: Any, output: Tensor, *scales: Any, **more_scales: Any,
    ) -> Tensor:  # fmt: skip
        """vLLM's interface: `query [rows, H, D]`, the pages, into `output [rows, H, D]`."""
        given = (layer, query, key, value, kv_cache)
        steps: dict[str, Step] = getattr(attn_metadata, "trianglemix", {})
        step = None if self.served is None else steps.get(self.served.role)
        if self.served is None or step is None:
            if self.served is not None and attn_metadata is not None:
                self.served.count.add(0, attn_metadata.num_actual_tokens)
            result: Tensor = super().forward(*given, attn_metadata, output, *scales, **more_scales)  # type: ignore[misc]
            return result
        if any(scale is not None for scale in (*scales, *more_scales.values())):
            raise ServingError(
                "vLLM wants the output of an attention quantised in one go with it, which "
                "TriangleMix's layers do not do; switch that fusion off"
            )
        if step.dense is not None:
            self._forward_dense(step.dense, given, output)
        rows = step.ours.rows
        target = rows.target(output)
        run = self.stream if self.served.role == TRIANGLE else self.attend_blocks
        run(rows.take(query), kv_cache, step, target)
        rows.put(output, target)
        self.served.count.add(step.our_rows, step.dense_rows)
        return output

    def _forward_dense(self, dense: DenseRows, given: tuple[Any, ...], output: Tensor) -> None:
        layer, query, key, value, kv_cache = given
        rows = dense.segments.rows
        target = rows.target(output)
        parts = (rows.take(query), rows.take(key), rows.take(value))
        super().forward(layer, *parts, kv_cache, dense.metadata, target)  # type: ignore[misc]
        rows.put(output, target)

    def stream(self, query: Tensor, kv_cache: Tensor, step: Step, output: Tensor) -> None:
        """`query [rows, H, D]`, the streaming rows of a triangle layer, into `output`."""
        raise NotImplementedError

    def attend_blocks(self, query: Tensor, kv_cache: Tensor, step: Step, output: Tensor) -> None:
        """`query [rows, H, D]`, the rows of a block-sparse layer's sparse tiles, into `output`."""
        assert isinstance(step.keeps, BlockRule)
        attention = BlockSparse(step.keeps, self.scale, float(self.logits_soft_cap))
        attend_sparse(query, step.ours, self.sparse_kernel(kv_cache, attention), output)

    def sparse_kernel(self, kv_cache: Tensor, attention: BlockSparse) -> SegmentKernel:
        """What runs a block-sparse layer's rows of one request."""
        return partial(attend_gathered, partial(self.gather, kv_cache), attention)

    def gather(self, kv_cache: Tensor, table: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[1, G, T, D]` of a request's first `T` tokens, in the pages `table`."""
        raise NotImplementedError

    def refusal(self, role: str, kv_cache_spec: Any) -> str | None:
        """Why this implementation cannot run a layer of that role, or None."""
        return None
