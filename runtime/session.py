"""The user's entry: an exported folder, loaded, that answers prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from trianglemix.manifest.manifest import Manifest
from trianglemix.runtime.backends.backend import Backend, Kernel
from trianglemix.runtime.backends.choose import BackendChoice, choose_backend
from trianglemix.runtime.errors import FolderError, PromptError
from trianglemix.runtime.generate import Generation
from trianglemix.runtime.kv_cache import IntArray, KVCache
from trianglemix.runtime.model_folder import ModelFolder
from trianglemix.runtime.request import Request, plan_groups
from trianglemix.runtime.result import GenerationResult
from trianglemix.runtime.sampling import GREEDY, Sampling
from trianglemix.runtime.tokenizer import Tokenizer

Prompt = str | Sequence[int] | NDArray[np.integer[Any]]
Batch = list[str] | list[list[int]] | list[Sequence[int]] | list[NDArray[np.integer[Any]]]


class TriangleSession:
    """A model ready to generate. `stop_ids` are the tokens that end an answer; they may be set."""

    def __init__(
        self, backend: Backend, tokenizer: Tokenizer | None, stop_ids: frozenset[int]
    ) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        provider: str = "auto",
        allow_fallback: bool = False,
        threads: int | None = None,
    ) -> TriangleSession:
        """Loads a folder that `trianglemix-export` wrote.

        Args:
            path: the folder.
            provider: "cpu", "cuda", or "auto" for CUDA where this ONNX Runtime has it. On others
                ("openvino", ...: `backends/providers.py`) the operator has no kernel, of which a
                warning is logged. A folder for Ascend runs on "npu", or with the same graphs on
                "cpu" ("auto").
            allow_fallback: run on the operator's slow function body if the library is missing.
            threads: CPU threads; None leaves the choice to ONNX Runtime.

        Raises:
            TriangleMixError: the folder, the provider, the library or a package is not usable.
        """
        folder = ModelFolder.load(Path(path))
        tokenizer = Tokenizer.from_folder(folder.path)
        backend = choose_backend(folder, BackendChoice(provider, allow_fallback, threads))
        stop_ids = folder.stop_ids
        if not stop_ids and tokenizer is not None and tokenizer.eos_id is not None:
            stop_ids = frozenset({tokenizer.eos_id})  # no file names any: what its text ends with
        return cls(backend, tokenizer, stop_ids)

    @property
    def manifest(self) -> Manifest:
        """What the folder says about its model: layers, pattern, context length."""
        return self.backend.manifest

    @property
    def kernel(self) -> Kernel:
        """ "native", "fallback" on the operator's slow function body, or "static" graphs."""
        return self.backend.kernel

    @property
    def provider(self) -> str:
        """What runs the model: "cpu", "cuda", "npu", or another provider of ONNX Runtime."""
        return self.backend.provider

    def new_cache(self, max_length: int | None = None) -> KVCache:
        """A cache for a conversation: given to every `generate`, each prompt continues the last.

        With `max_length` its memory is taken once; without, it grows.
        """
        return KVCache(self.backend, max_length=max_length)

    @overload
    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = ...,
        *,
        prefill_chunk: int | None = ...,
        sampling: Sampling = ...,
        cache: KVCache | None = ...,
    ) -> GenerationResult: ...

    @overload
    def generate(
        self,
        prompt: Batch,
        max_new_tokens: int = ...,
        *,
        prefill_chunk: int | None = ...,
        sampling: Sampling = ...,
        cache: KVCache | None = ...,
    ) -> list[GenerationResult]: ...

    def generate(
        self,
        prompt: Prompt | Batch,
        max_new_tokens: int = 128,
        *,
        prefill_chunk: int | None = None,
        sampling: Sampling = GREEDY,
        cache: KVCache | None = None,
    ) -> GenerationResult | list[GenerationResult]:
        """Answers a prompt, or a list of prompts; `stream` has the arguments."""
        results = self.stream(
            prompt,
            max_new_tokens,
            prefill_chunk=prefill_chunk,
            sampling=sampling,
            cache=cache,
        ).results()
        return results if _is_batch(prompt) else results[0]

    def stream(
        self,
        prompt: Prompt | Batch,
        max_new_tokens: int = 128,
        *,
        prefill_chunk: int | None = None,
        sampling: Sampling = GREEDY,
        cache: KVCache | None = None,
    ) -> Generation:
        """Yields tokens as they are chosen; its `result()` has text and figures at the end.

        Args:
            prompt: text, token ids, or a list of either. Rows of a batch give what they give
                alone; a model without left padding runs rows of unequal length one by one.
            max_new_tokens: the most tokens to generate.
            prefill_chunk: tokens of the prompt per step, to bound memory; the answer stays that
                of one pass. None reads the prompt in one step. A model with block-sparse layers
                reads whole tiles of 128 tokens, one at least.
            sampling: greedy unless told otherwise.
            cache: from `new_cache`, for one prompt that continues what the cache holds.

        Raises:
            PromptError: an argument is out of its range, or the text exceeds the context.
            FallbackError: a fallback that needs more memory than there is.
        """
        started = time.perf_counter()
        entries = prompt if _is_batch(prompt) else [prompt]
        request = Request(
            [self._token_ids(entry) for entry in entries],
            max_new_tokens,
            prefill_chunk,
            sampling,
            self.stop_ids,
        )
        groups = plan_groups(request, self.backend, cache)
        return Generation(groups, request, self.tokenizer, time.perf_counter() - started)

    def _token_ids(self, prompt: object) -> IntArray:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise FolderError("the folder has no tokenizer.json; give token ids, not text")
            text, prompt = prompt, self.tokenizer.encode(prompt)
            if text and not len(prompt):
                raise PromptError("the tokenizer has no tokens for this text; give other text")
        ids = np.asarray(prompt)
        if ids.shape == (0,):
            raise PromptError("the prompt is empty; give text, or at least one token id")
        if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise PromptError(
                f"a prompt of shape {list(ids.shape)} and type {ids.dtype} is not usable; give "
                "text, or a row of integer token ids"
            )
        self._check_ids(ids)
        return ids.astype(np.int64)

    def _check_ids(self, ids: NDArray[np.integer[Any]]) -> None:
        """An index outside an embedding is an error on some devices, and another row on others."""
        shapes = [out.shape for out in self.manifest.outputs if out.name == self.manifest.logits]
        sizes = [shape[-1] for shape in shapes if shape and isinstance(shape[-1], int)]
        wrong = ids[(ids < 0) | (ids >= min(sizes, default=np.iinfo(np.int64).max))]
        if wrong.size:
            raise PromptError(
                f"the prompt has the token id {wrong[0]}, but the model's go from 0 to "
                f"{sizes[0] - 1 if sizes else 'what it embeds'}; is the tokenizer another model's?"
            )


def _is_batch(prompt: Prompt | Batch) -> bool:
    """A list of anything but numbers is a batch."""
    return isinstance(prompt, list) and not all(
        isinstance(entry, int | np.integer) for entry in prompt
    )
