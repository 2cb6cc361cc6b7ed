"""Exported folders as a model type of lm-evaluation-harness.

    python -m trianglemix.evaluation.harness --model trianglemix \
        --model_args folder=out/ --tasks lambada_openai
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from trianglemix.custom_ops.errors import ConfigurationError, TriangleMixError
from trianglemix.evaluation.likelihood import FolderScorer
from trianglemix.runtime.errors import MissingPackageError
from trianglemix.runtime.sampling import GREEDY, Sampling
from trianglemix.runtime.session import TriangleSession

_MISSING: Final = (
    "lm-evaluation-harness 0.4.13 or newer is not installed; pip install 'trianglemix[harness]'"
)
try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from tqdm import tqdm  # type: ignore[import-untyped]
except ImportError as error:
    if __name__ == "__main__":
        sys.exit(f"error: {_MISSING}")
    raise MissingPackageError(_MISSING) from error

_MAX_NEW_TOKENS: Final = 256


@register_model("trianglemix")
class TriangleMixLM(LM):  # type: ignore[misc]
    """A folder written by `trianglemix-export`, one request at a time."""

    def __init__(
        self,
        folder: str,
        provider: str = "auto",
        threads: int | None = None,
        **settings: Any,
    ) -> None:
        """`provider` and `threads` as in `TriangleSession`.

        `settings` are what the harness tells every model. They change nothing here: it says
        `device="cuda:0"` even where nobody asked for a device.

        Raises:
            TriangleMixError: the folder cannot be run, or an argument does not exist.
        """
        super().__init__()
        unknown = sorted(settings.keys() - {"batch_size", "max_batch_size", "device"})
        if unknown:
            raise ConfigurationError(
                f"--model_args names {', '.join(unknown)}, but knows folder, provider and threads"
            )
        self._folder = Path(str(folder))  # the harness reads a name of digits as a number
        session = TriangleSession.from_folder(self._folder, provider, threads=threads)
        self._scorer = FolderScorer(session)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """`(log-likelihood, is greedy)` of each `(context, continuation)`."""

        def score(context: str, continuation: str) -> tuple[float, bool]:
            result = self._scorer.likelihood(context, continuation)
            return result.logarithm, result.greedy

        return list(self._answers("loglikelihood", score, requests))

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-likelihood of each text, read as a prompt."""
        return list(self._answers("loglikelihood_rolling", self._scorer.rolling, requests))

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers to each `(context, settings)`, greedy unless the settings say otherwise."""
        return list(self._answers("generate_until", self._generate, requests))

    def _answers(
        self, kind: str, answer: Callable[..., Any], requests: Sequence[Any]
    ) -> Iterator[Any]:
        for request in tqdm(requests, desc=f"Running {kind} requests"):
            result = answer(*request.args)
            self.cache_hook.add_partial(kind, request.args, result)  # for --use_cache
            yield result

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        given: dict[str, Any] = dict(normalize_gen_kwargs(settings, _MAX_NEW_TOKENS))
        until = [stop for stop in given["until"] if stop]
        sampling = _sampling(given) if given["do_sample"] else GREEDY
        return self._scorer.generate(context, until, given["max_gen_toks"], sampling)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as a prompt; without a generation prompt its last message goes on."""
        text = self._scorer.tokenizer.render_chat(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    @property
    def tokenizer_name(self) -> str:
        """Keeps the harness's cached requests of one chat template from those of another."""
        return str(self._folder.resolve()).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness records beside the results."""
        session = self._scorer.session
        return {
            "provider": session.provider,
            "kernel": session.kernel,
            "triangle_layers": list(session.manifest.triangle_layers),
            "block_sparse_layers": list(session.manifest.block_sparse_layers),
            "layers": session.manifest.num_layers,
            "pattern": asdict(session.manifest.pattern),
            "block_rule": asdict(rule) if (rule := session.manifest.block_rule) else None,
        }


def _sampling(given: dict[str, Any]) -> Sampling:
    """Draws follow the harness's own seed, which NumPy's global state holds."""
    return Sampling(
        float(given.get("temperature", 1.0)),
        int(given.get("top_k", 0)),
        float(given.get("top_p", 1.0)),
        seed=int(np.random.randint(2**31)),
    )


def main() -> None:
    """The harness's own command line, with our model type; our errors are one line."""
    try:
        cli_evaluate()
    except TriangleMixError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
