"""How the length of each request's prompt, `N` of the pattern, reaches the attention of a step.

vLLM's metadata of a step has no such field but `rswa_prefix_lens`, made for models with a sliding
window behind a reference ("R-SWA"), which is filled with exactly these lengths whenever the model's
configuration names such a window. We name one that is never used. That is a side effect nobody
promised, so it is looked at when the engine starts, and again in every step that reads a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from trianglemix.vllm.errors import ServingError
from trianglemix.vllm.row_split import Request

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


def requests_of(metadata: Any) -> tuple[Request, ...] | None:
    """The requests of a step, from vLLM's `CommonAttentionMetadata`, padding included.

    Lengths come from tensors on the CPU, so that nothing waits for a device. The V2 runner has the
    prompt lengths on the device; there a step of single rows, which decodes, is not looked into
    (None). Raises ServingError where the runner hands over no prompt lengths.
    """
    lengths = getattr(metadata, _FIELD, None)
    if lengths is None:
        raise ServingError(
            "vLLM's runner did not hand over the lengths of the prompts, without which the last "
            "rows of a prompt are not known; use a version that docs/vllm.md lists"
        )
    if lengths.device.type != "cpu" and metadata.max_query_len == 1:
        return None
    tokens = metadata.seq_lens_cpu_upper_bound
    tokens = metadata.seq_lens if tokens is None else tokens
    rows = metadata.query_start_loc_cpu.tolist(), tokens.tolist(), lengths.tolist()
    return _requests(*rows)


def _requests(
    starts: Sequence[int], tokens: Sequence[int], lengths: Sequence[int]
) -> tuple[Request, ...]:
    count = min(len(starts) - 1, len(tokens), len(lengths))
    return tuple(Request(starts[r], starts[r + 1], tokens[r], lengths[r]) for r in range(count))
