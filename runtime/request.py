"""A request for a generation: its settings, whether it can be met, what runs together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trianglemix.manifest.interface import fixed_length
from trianglemix.manifest.manifest import Manifest
from trianglemix.runtime.backends.backend import Backend
from trianglemix.runtime.chunks import chunk_ends, share_edges
from trianglemix.runtime.errors import PromptError
from trianglemix.runtime.kv_cache import IntArray, KVCache
from trianglemix.runtime.sampling import Sampling

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What is wanted. Lengths in tokens; `prefill_chunk` None reads a prompt in one pass."""

    prompts: Sequence[IntArray]
    max_new_tokens: int
    prefill_chunk: int | None
    sampling: Sampling
    stop_ids: frozenset[int]


@dataclass(frozen=True)
class Group:
    """Prompts, with their places in the batch, that go through the model together.

    The cache is opened when the group's turn comes.
    """

    rows: range
    prompts: Sequence[IntArray]
    open_cache: Callable[[], KVCache]


def plan_groups(request: Request, backend: Backend, cache: KVCache | None) -> list[Group]:
    """The prompts in groups: all in one, unless the model cannot take them so.

    Raises:
        PromptError: a setting is out of its range, or the text exceeds the context.
        FallbackError: a fallback that needs more memory than there is.
    """
    if cache is not None and not cache.belongs_to(backend):
        raise PromptError(
            "this cache was made by another session, whose keys and values it holds; make one "
            "with this session's new_cache()"
        )
    _check_settings(request, backend.manifest, cache)
    _check_steps(request, backend.manifest, cache)
    _check_switches(request, backend.manifest, cache)
    groups = _groups(request, backend, cache)
    for group in groups:
        _check_length(group, request, backend, cache)
    return groups


def _check_settings(request: Request, manifest: Manifest, cache: KVCache | None) -> None:
    prompts, chunk = request.prompts, request.prefill_chunk
    if not prompts:
        raise PromptError("the batch has no prompts; give at least one")
    if request.max_new_tokens < 1:
        raise PromptError(f"max_new_tokens is {request.max_new_tokens}, but must be 1 or more")
    if chunk is not None and chunk < 1:
        raise PromptError(f"prefill_chunk is {chunk}, but must be 1 or more")
    if cache is not None and len(prompts) > 1:
        raise PromptError(
            f"a cache continues one conversation, but {len(prompts)} prompts were given; "
            "give each its own cache"
        )
    splits = chunk is not None and any(len(ids) > chunk for ids in prompts)
    if splits and manifest.drops_keys and not manifest.takes_prompt_end:
        raise PromptError(
            "this model has no prompt_length input, without which a chunked prompt gives another "
            "answer than a whole one; leave out prefill_chunk, or export it again"
        )


def _check_steps(request: Request, manifest: Manifest, cache: KVCache | None) -> None:
    """Refuses what would read a prompt in several calls where the model cannot go on with them."""
    if manifest.chunked_prefill:
        return
    chunk = request.prefill_chunk
    if chunk is not None and any(len(ids) > chunk for ids in request.prompts):
        raise PromptError(
            "this model keeps a state of which it is not known that a prompt's next part goes on "
            "from it, so that a chunked prompt might give another answer; leave out prefill_chunk"
        )
    if cache is not None and cache.length:
        raise PromptError(
            "this model keeps a state of which it is not known that a second prompt goes on from "
            "it; give the whole conversation as one prompt, without a cache"
        )


def _check_switches(request: Request, manifest: Manifest, cache: KVCache | None) -> None:
    """Refuses a prompt in parts on both sides of a length at which the model computes otherwise.

    What is stored before it was made in another way than one pass would have made it.
    """
    held = 0 if cache is None else cache.length + cache.pending.shape[1]
    longest = max(len(ids) for ids in request.prompts)
    step = fixed_length(manifest.inputs)
    kept = 0 if cache is None else cache.length
    tiles = 0 if manifest.block_sparse_layers else None
    chunk = chunk_ends(0, longest, request.prefill_chunk, tiles)[0]
    first = kept or min(longest, chunk, step or longest)
    for number in manifest.length_switches:
        if first <= number < held + longest:
            part = f"the {held} tokens before" if held else f"a chunk of {first} tokens"
            raise PromptError(
                f"beyond {number} tokens this model computes otherwise, so that {part} would be "
                f"read in another way than the {held + longest} tokens in one pass; "
                + ("give the whole conversation as one prompt, without a cache" if held
                   else f"leave out prefill_chunk, or give more than {number}")
            )  # fmt: skip
        # Else the text so far is read again, but not that of a cache, nor in single steps.
        end = held + longest
        if (cache is not None or step) and end <= number < end + request.max_new_tokens - 1:
            raise PromptError(
                f"beyond {number} tokens this model computes otherwise, which {end} tokens and an "
                f"answer of {request.max_new_tokens} would pass; give max_new_tokens "
                f"{number - end + 1} or less, or the conversation as one prompt without a cache"
            )


def _groups(request: Request, backend: Backend, cache: KVCache | None) -> list[Group]:
    prompts = request.prompts
    if cache is not None:
        return [Group(range(1), prompts, lambda: cache)]
    if len(prompts) == 1 or _fits_one_batch(request, backend.manifest):
        rows = range(len(prompts))
        return [Group(rows, prompts, lambda: KVCache(backend, len(rows)))]
    _LOG.info(
        "%s: running %d prompts in turn", _why_in_turn(request, backend.manifest), len(prompts)
    )
    return [
        Group(range(row, row + 1), [ids], lambda: KVCache(backend))
        for row, ids in enumerate(prompts)
    ]


def _why_in_turn(request: Request, manifest: Manifest) -> str:
    if manifest.batch == 1:
        return "this model takes one row at a time"
    if _cuts_tiles(request, manifest):
        return "chunks that are whole tiles of one row cut those of another"
    if manifest.left_padding:
        return "this model reads a row by the longest one's length"
    return "this model takes no left padding"


def _fits_one_batch(request: Request, manifest: Manifest) -> bool:
    if manifest.batch == 1:
        return False
    lengths = {len(ids) for ids in request.prompts}
    longest, end = max(lengths), max(lengths) + request.max_new_tokens
    if len(lengths) > 1 and any(min(lengths) <= x < end for x in manifest.length_switches):
        return False  # the longest row would decide how the others are read
    if _cuts_tiles(request, manifest):
        return False
    if manifest.left_padding:
        return True
    # GroupQueryAttention: no pads on the left, nor (CPU) several tokens after a past.
    return len(lengths) == 1 and (request.prefill_chunk or longest) >= longest


def _cuts_tiles(request: Request, manifest: Manifest) -> bool:
    """Whether chunks of the prompts as a batch would cut tiles, which makes those dense."""
    lengths = [len(ids) for ids in request.prompts]
    chunk = request.prefill_chunk
    in_chunks = chunk is not None and max(lengths) > chunk
    return bool(manifest.block_sparse_layers) and in_chunks and not share_edges(lengths)


def _check_length(group: Group, request: Request, backend: Backend, cache: KVCache | None) -> None:
    held = 0 if cache is None else cache.length + cache.pending.shape[1]
    limit = backend.manifest.context_length if cache is None else cache.limit
    longest = max(len(ids) for ids in group.prompts)
    end = held + longest + request.max_new_tokens
    if limit is not None and end > limit:
        before = f"{held} tokens before, " if held else ""
        raise PromptError(
            f"{before}{longest} prompt tokens and max_new_tokens {request.max_new_tokens} "
            f"make {end}, but the context has {limit}; shorten the prompt or the answer"
        )
    rows = min(longest, request.prefill_chunk or longest)
    backend.check_memory(len(group.prompts), rows, held + longest)
