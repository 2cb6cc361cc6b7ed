"""Exported folders as a model type of lm-evaluation-harness.

    python -m trianglemix.evaluation.harness --model trianglemix \
        --model_args folder=out/ --tasks lambada_openai
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from trianglemix.evaluation.likelihood import FolderScorer
from trianglemix.runtime.session import TriangleSession

_MAX_NEW_TOKENS: Final = 256


@register_model("trianglemix")
class TriangleMixLM(LM):  # type: ignore[misc]
    """A folder written by `trianglemix-export`, one request at a time."""

    def __init__(self, folder: str, provider: str = "auto", **ignored: Any) -> None:
        """`ignored` are the harness's own settings for every model (batch_size, device)."""
        super().__init__()
        self._scorer = FolderScorer(TriangleSession.from_folder(Path(folder), provider))

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """`(log-likelihood, is greedy)` of each `(context, continuation)`."""
        results = [self._scorer.likelihood(*request.args) for request in requests]
        return [(result.logarithm, result.greedy) for result in results]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-likelihood of each text."""
        return [self._scorer.rolling(request.args[0]) for request in requests]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers of each `(context, settings)`."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else until
        length = settings.get("max_gen_toks", settings.get("max_new_tokens", _MAX_NEW_TOKENS))
        return self._scorer.generate(context, until, int(length))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
