"""How the length of each request's prompt, `N` of the pattern, reaches the attention of a step.

vLLM's metadata of a step has no such field but `rswa_prefix_lens`, made for models with a sliding
window behind a reference ("R-SWA"), which is filled with exactly these lengths whenever the model's
configuration names such a window. We name one that is never used. That is a side effect nobody
promised, so it is looked at when the engine starts, and again in every step that reads a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from trianglemix.custom_ops.arrays import IntArray
from trianglemix.vllm.errors import ServingError
from trianglemix.vllm.roles import Keeps
from trianglemix.vllm.row_split import Request, our_span

ENDLESS: Final = 2**30
"""A window longer than any prompt: nothing reads it, vLLM only asks whether there is one."""
_FIELD: Final = "rswa_prefix_lens"


def ask_for_prompt_lengths(model_config: Any) -> None:
    """Makes vLLM's runner hand prompt lengths to every step from now on.

    To be called once vLLM's own metadata builder is made, which would else take the window for the
    model's. Raises ServingError where the model has such a window, or nothing asks for it.
    """
    if getattr(model_config, "rswa_window", None) not in (None, ENDLESS):
        raise ServingError(
            f"the model has a window behind a reference of {model_config.rswa_window} tokens "
            "(R-SWA), of which TriangleMix knows nothing; serve it without TriangleMix"
        )
    model_config.model_arch_config.rswa_window = ENDLESS
    if model_config.rswa_window != ENDLESS:
        raise ServingError(
            "this vLLM does not take rswa_window from the model's architecture, so prompt lengths "
            "do not reach the attention; install a version that docs/vllm.md lists"
        )


@contextmanager
def without_our_window(model_config: Any) -> Iterator[None]:
    """Has vLLM make its builders as if nobody had asked for prompt lengths.

    Builders are made more than once: before graphs are recorded as a trial, for a draft model. One
    that saw our window would copy all prompt lengths to the device in every step, for nothing.
    """
    ours = getattr(model_config, "rswa_window", None) == ENDLESS
    if ours:
        model_config.model_arch_config.rswa_window = None
    try:
        yield
    finally:
        if ours:
            model_config.model_arch_config.rswa_window = ENDLESS


@dataclass(frozen=True)
class StepLengths:
    """A step: `starts [n + 1]` of the requests' rows, their tokens, their prompts' lengths."""

    starts: IntArray
    tokens: IntArray
    prompt_lengths: IntArray

    def any_are_ours(self, keeps: Keeps) -> bool:
        """Whether a row may drop a key: asked in every step, so by arrays and not by requests."""
        first = self.tokens - np.diff(self.starts)
        begins, ends = our_span(first, self.tokens, self.prompt_lengths, keeps)
        return bool((np.maximum(first, begins) < np.minimum(self.tokens, ends)).any())

    @property
    def requests(self) -> tuple[Request, ...]:
        """One by one, padding included."""
        edges = self.starts.tolist()
        numbers = zip(edges, edges[1:], self.tokens.tolist(), self.prompt_lengths.tolist(),
                      strict=False)  # fmt: skip
        return tuple(Request(*row) for row in numbers)


def step_lengths(metadata: Any) -> StepLengths | None:
    """The lengths of a step, from vLLM's `CommonAttentionMetadata`; None where no row is ours.

    They come from tensors on the CPU, so that nothing waits for a device. The V2 runner has the
    prompt lengths on the device, and none in the steps without requests by which it warms up and
    records graphs; there a step that reads no prompt is not looked into. Raises ServingError where
    the runner hands over none.
    """
    lengths = getattr(metadata, _FIELD, None)
    away = lengths is None or lengths.device.type != "cpu"
    if away and (metadata.max_query_len == 1 or _reads_no_prompt(metadata)):
        return None
    if lengths is None:
        raise ServingError(
            "vLLM's runner did not hand over the lengths of the prompts, without which the last "
            "rows of a prompt are not known; use a version that docs/vllm.md lists"
        )
    tokens = metadata.seq_lens_cpu_upper_bound
    tokens = metadata.seq_lens if tokens is None else tokens
    count = min(len(metadata.query_start_loc_cpu) - 1, len(tokens), len(lengths))
    return StepLengths(
        metadata.query_start_loc_cpu[: count + 1].numpy(),
        tokens[:count].cpu().numpy(),
        lengths[:count].cpu().numpy(),
    )


def _reads_no_prompt(metadata: Any) -> bool:
    """Whether vLLM says of every request that its prompt was read before; False: it says nothing.

    Rows that are ours lie before their prompt's end, so a request that has some is said to read it.
    """
    reading = getattr(metadata, "is_prefilling", None)
    return reading is not None and reading.device.type == "cpu" and not bool(reading.any())
