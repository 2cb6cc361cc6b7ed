"""`manifest.json`: what an exported folder says about its model; exporter writes, runtime reads."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

from pydantic import Field
from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.errors import TriangleMixError
from trianglemix.custom_ops.strict import STRICT
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.manifest.checked_json import (
    Count,
    FileName,
    Index,
    JsonFileError,
    JsonVersionError,
    one_of,
    read_checked,
    shown,
)
from trianglemix.manifest.interface import GraphInput, GraphOutput, fixed_batch, has_cache
from trianglemix.manifest.static_graphs import StaticGraphs

FILE_NAME: Final = "manifest.json"
FORMAT_VERSION: Final = 2
RUNS: Final = "ok"
_MAIN: Final = ("input_ids", "attention_mask", "position_ids", "prompt_length", "logits")
_OF_A_LAYER: Final = ("past_key", "past_value", "present_key", "present_value")


class ManifestError(TriangleMixError):
    """The folder's manifest is missing, unreadable, of another version, or contradicts itself."""


@dataclass(frozen=True)
class LayerCache:
    """Graph names and sizes of one layer's KV cache, `[B, G, P, D]` and `[B, G, P, Dv]`."""

    __pydantic_config__: ClassVar[Any] = STRICT

    layer: Index
    past_key: str
    past_value: str
    present_key: str
    present_value: str
    kv_num_heads: Count
    head_size: Count
    value_head_size: Count


@dataclass(frozen=True)
class Manifest:
    """Names, cache layout and capabilities of an exported model. Layers count from 0.

    `inputs` and `outputs` are the whole interface (empty for `static` graphs, which state their
    own); the names before them are those of its main parts, `cache` the layers' own caches.
    """

    __pydantic_config__: ClassVar[Any] = STRICT

    target: Annotated[str, Field(pattern="^[a-z][a-z0-9_-]*$")]  # the exporter's
    model_file: FileName
    cache_dtype: Annotated[str, one_of("float32", "float16", "bfloat16")]
    input_ids: str  # [B, S]
    attention_mask: str | None  # [B, T], 1 = a real token; None for `static` graphs
    position_ids: str | None  # [B, S], [S] or [sections, B, S]
    prompt_length: str | None  # [B] int32, optional input: 0 or less = the end of the row's keys
    logits: str  # [B, S, vocabulary], or [B, 1, vocabulary] with last_token_logits
    last_token_logits: bool
    num_layers: Count
    triangle_layers: tuple[Index, ...]
    pattern: TrianglePattern
    cache: tuple[LayerCache, ...]
    shared_cache: bool  # present may be bound to the past's preallocated buffer
    left_padding: bool  # rows of a batch may be padded on the left, in every layer
    context_length: Count | None  # tokens, None where the source does not say
    static: StaticGraphs | None = None  # instead of one model file with free lengths
    inputs: tuple[GraphInput, ...] = ()
    outputs: tuple[GraphOutput, ...] = ()
    chunked_prefill: bool = True  # a prompt may come in several calls
    length_switches: tuple[Count, ...] = ()  # tokens at which the model computes otherwise
    runtime: str = RUNS  # or why trianglemix-run cannot run it, where plain ONNX Runtime can
    block_sparse_layers: tuple[Index, ...] = ()
    block_rule: BlockRule | None = None  # of those layers

    @property
    def past_of(self) -> dict[str, str]:
        """By the name of each layer's present key or value, the past that it continues."""
        keys = {layer.present_key: layer.past_key for layer in self.cache}
        return keys | {layer.present_value: layer.past_value for layer in self.cache}

    @property
    def batch(self) -> int | None:
        """Rows that every call must have, None where any number will do."""
        return 1 if self.static is not None else fixed_batch(self.inputs)

    @property
    def has_cache(self) -> bool:
        """Whether a call continues the one before; else every call must read the whole text.

        States alone do not do it: attention has to see the keys of earlier tokens.
        """
        return self.static is not None or has_cache(self.inputs)

    @property
    def drops_keys(self) -> bool:
        """Whether some layer keeps less than its source, which depends on the prompt's end."""
        return bool(self.triangle_layers or self.block_sparse_layers)

    @property
    def takes_prompt_end(self) -> bool:
        """Whether a call can be told where the prompt ends that it is a part of."""
        return self.static is not None or self.prompt_length is not None

    def save(self, folder: Path) -> None:
        """Writes `manifest.json` into `folder`."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        (folder / FILE_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Reads the manifest of an exported folder.

        Raises:
            ManifestError: no manifest, not JSON, another format version, a value of another type or
                out of its range, or parts that contradict each other.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            raise ManifestError(
                f"{folder} is no folder with a {FILE_NAME}; give one that trianglemix-export wrote"
            )
        try:
            manifest = read_checked(path, cls, FORMAT_VERSION)
        except JsonVersionError as error:
            raise ManifestError(
                f"{path} has format version {shown(error.found)}, but this trianglemix reads "
                f"{FORMAT_VERSION}; export the model again"
            ) from error
        except JsonFileError as error:
            raise ManifestError(f"{path} {error}; export the model again") from error
        for contradiction in _contradictions(manifest):
            raise ManifestError(f"{path} says {contradiction}; export the model again")
        return manifest


def _contradictions(manifest: Manifest) -> Iterator[str]:
    """What cannot be true together, in clauses."""
    caches = tuple(cache.layer for cache in manifest.cache)
    kinds = {
        "triangle_layers": manifest.triangle_layers,
        "block_sparse_layers": manifest.block_sparse_layers,
        "cache": caches,
    }
    for name, layers in kinds.items():
        for layer, count in Counter(layers).items():
            if count > 1:
                yield f"that {name} has layer {layer} twice"
            if layer >= manifest.num_layers:
                yield f"that {name} has layer {layer}, of {manifest.num_layers} layers in all"
    for layer in sorted({*manifest.triangle_layers} & {*manifest.block_sparse_layers}):
        yield f"that layer {layer} is both a triangle and a block-sparse layer"
    if bool(manifest.block_sparse_layers) != (manifest.block_rule is not None):
        yield "which layers are block-sparse without a rule for them, or a rule without layers"
    if manifest.inputs:
        yield from _strange_names(manifest)


def _strange_names(manifest: Manifest) -> Iterator[str]:
    """Names of the main parts that the tables of inputs and outputs have not, or for other uses."""
    uses: dict[str, tuple[str, int | None]] = {}
    table: tuple[GraphInput | GraphOutput, ...] = (*manifest.inputs, *manifest.outputs)
    for value in table:
        if value.name in uses:
            yield f"that {shown(value.name)} is the name of two inputs or outputs"
        uses[value.name] = (value.role, value.layer)
    main = {name: getattr(manifest, name) for name in _MAIN}
    wanted: list[tuple[str | None, str, int | None]] = [(n, role, None) for role, n in main.items()]
    for cache in manifest.cache:
        names = {role: getattr(cache, role) for role in _OF_A_LAYER}
        wanted += [(name, role, cache.layer) for role, name in names.items()]
    for name, role, layer in wanted:
        if name is not None and uses.get(name) != (role, layer):
            of = "" if layer is None else f" of layer {layer}"
            yield f"that {shown(name)} is the {role}{of}, which its inputs and outputs do not"
    for value in manifest.inputs:
        yield from _strange_sizes(value, manifest)


def _strange_sizes(value: GraphInput, manifest: Manifest) -> Iterator[str]:
    """A layer's cache whose heads and head size are not those of its input."""
    inside = [
        size
        for axis, size in enumerate(value.shape or ())
        if axis not in (value.batch_axis, value.token_axis)
    ]
    for cache in manifest.cache:
        sizes = {cache.past_key: cache.head_size, cache.past_value: cache.value_head_size}
        size = sizes.get(value.name)
        if size is None or not inside or not all(isinstance(x, int) for x in inside):
            continue
        if math.prod(x for x in inside if isinstance(x, int)) != cache.kv_num_heads * size:
            yield (
                f"that layer {cache.layer} has {cache.kv_num_heads} key/value heads of {size}, but "
                f"that {shown(value.name)} is {list(value.shape or ())}"
            )
