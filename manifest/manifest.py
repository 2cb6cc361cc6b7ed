"""`manifest.json`: what an exported folder says about its model; exporter writes, runtime reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.errors import TriangleMixError
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.manifest.interface import (
    GraphInput,
    GraphOutput,
    fixed_batch,
    has_cache,
    read_inputs,
    read_outputs,
)
from trianglemix.manifest.static_graphs import StaticGraphs

FILE_NAME: Final = "manifest.json"
FORMAT_VERSION: Final = 2
RUNS: Final = "ok"


class ManifestError(TriangleMixError):
    """The folder's manifest is missing, unreadable, or of another version."""


@dataclass(frozen=True)
class LayerCache:
    """Graph names and sizes of one layer's KV cache, `[B, G, P, D]` and `[B, G, P, Dv]`."""

    layer: int
    past_key: str
    past_value: str
    present_key: str
    present_value: str
    kv_num_heads: int
    head_size: int
    value_head_size: int


@dataclass(frozen=True)
class Manifest:
    """Names, cache layout and capabilities of an exported model. Layers count from 0.

    `inputs` and `outputs` are the whole interface (empty for `static` graphs, which state their
    own); the names before them are those of its main parts, `cache` the layers' own caches.
    """

    target: str
    model_file: str
    cache_dtype: str  # "float32", "float16" or "bfloat16"
    input_ids: str  # [B, S]
    attention_mask: str | None  # [B, T], 1 = a real token; None for `static` graphs
    position_ids: str | None  # [B, S], [S] or [sections, B, S]
    prompt_length: str | None  # [B] int32, optional input: 0 or less = the end of the row's keys
    logits: str  # [B, S, vocabulary], or [B, 1, vocabulary] with last_token_logits
    last_token_logits: bool
    num_layers: int
    triangle_layers: tuple[int, ...]
    pattern: TrianglePattern
    cache: tuple[LayerCache, ...]
    shared_cache: bool  # present may be bound to the past's preallocated buffer
    left_padding: bool  # rows of a batch may be padded on the left, in every layer
    context_length: int | None  # tokens, None where the source does not say
    static: StaticGraphs | None = None  # instead of one model file with free lengths
    inputs: tuple[GraphInput, ...] = ()
    outputs: tuple[GraphOutput, ...] = ()
    chunked_prefill: bool = True  # a prompt may come in several calls
    length_switches: tuple[int, ...] = ()  # tokens at which the model computes otherwise
    runtime: str = RUNS  # or why trianglemix-run cannot run it, where plain ONNX Runtime can
    block_sparse_layers: tuple[int, ...] = ()
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
            ManifestError: no manifest, not JSON, another format version, or fields missing.
        """
        path = folder / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ManifestError(
                f"{folder} is no folder with a {FILE_NAME}; give one that trianglemix-export wrote"
            ) from error
        except (OSError, ValueError) as error:
            raise ManifestError(
                f"{path} cannot be read ({error}); give a folder written by trianglemix-export"
            ) from error
        version = content.pop("format_version", None) if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise ManifestError(
                f"{path} has format version {version}, but this trianglemix reads "
                f"{FORMAT_VERSION}; export the model again"
            )
        try:
            content["pattern"] = TrianglePattern(**content["pattern"])
            content["cache"] = tuple(LayerCache(**layer) for layer in content["cache"])
            content["triangle_layers"] = tuple(content["triangle_layers"])
            content["block_sparse_layers"] = tuple(content.get("block_sparse_layers", ()))
            if content.get("block_rule") is not None:
                content["block_rule"] = BlockRule(**content["block_rule"])
            content["length_switches"] = tuple(content["length_switches"])
            content["inputs"] = read_inputs(content["inputs"])
            content["outputs"] = read_outputs(content["outputs"])
            if content.get("static") is not None:
                content["static"] = StaticGraphs.from_content(content["static"])
            return cls(**content)
        except (KeyError, TypeError) as error:
            raise ManifestError(f"{path} lacks what this version needs: {error}") from error
