"""An exported folder as a model to evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.evaluation.model import Answer, reset_peak_memory
from trianglemix.runtime.session import TriangleSession
from trianglemix.runtime.tokenizer import Tokenizer


class OnnxModel:
    """A folder written by `trianglemix-export`, in ONNX Runtime."""

    def __init__(self, folder: Path, provider: str = "auto", threads: int | None = None) -> None:
        """Raises TriangleMixError when the folder cannot be run or has no tokenizer."""
        counted = reset_peak_memory()
        self._session = TriangleSession.from_folder(folder, provider, threads=threads)
        if self._session.tokenizer is None:
            raise ConfigurationError(f"{folder} has no tokenizer.json, which the tasks need")
        self.tokenizer: Tokenizer = self._session.tokenizer
        self._counted = counted and self._session.provider == "cpu"
        self._peak_mb = 0.0

    @property
    def facts(self) -> Mapping[str, Any]:
        """Kind, layers, pattern, rule, provider and kernel.

        What the rule kept is not among them: deployed graphs do not put it out.
        """
        manifest = self._session.manifest
        return {
            "kind": "ONNX Runtime",
            "triangle_layers": list(manifest.triangle_layers),
            "block_sparse_layers": list(manifest.block_sparse_layers),
            "layers": manifest.num_layers,
            "pattern": asdict(manifest.pattern) if manifest.triangle_layers else None,
            "rule": asdict(manifest.block_rule) if manifest.block_rule else None,
            "device": self._session.provider,
            "kernel": self._session.kernel,
        }

    def answer(self, ids: tuple[int, ...], max_new_tokens: int) -> Answer:
        """Greedy, one prompt."""
        result = self._session.generate(list(ids), max_new_tokens)
        self._peak_mb = result.peak_rss_mb
        return Answer(result.text, result.prompt_tokens, result.ttft_s)

    def peak_memory_mb(self) -> float | None:
        """Peak resident memory since loading, on the CPU."""
        return self._peak_mb if self._counted else None
