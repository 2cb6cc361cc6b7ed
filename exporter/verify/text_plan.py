"""Which texts `--verify` reads: bounded by the context, what the graph takes, and memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from trianglemix.exporter.verify.comparisons import Checks
from trianglemix.exporter.verify.graph_facts import GraphFacts
from trianglemix.exporter.verify.text_reading import Text, chunk_ends
from trianglemix.manifest.interface import fixed_length, fixed_past, fixed_total

_SHORT: Final = 157  # tokens of the shorter text, or a little more than the widest window
_BEYOND_WINDOW: Final = 37
_LONGEST_SHORT: Final = 700
_STEPS: Final = 3
_PADS: Final = 3
_BEYOND: Final = 64  # tokens of the prompt after the first one that drops something
_BEYOND_TILES: Final = 11 * 64  # five tiles that choose, and a half one
_TILE_TENSORS: Final = 2  # as large as one layer's scores, of the body that runs alone
_FURTHEST_DROP: Final = 1 << 14  # tokens read, unless more were asked for, to see keys dropped
_MOST_BYTES: Final = 1 << 29  # of one layer's scores, or of the logits, in one call
_BODY_TENSORS: Final = 4  # of the size of the scores, that the function body holds at once


@dataclass(frozen=True)
class Planner:
    """Makes the texts; `limit` is how many tokens may be fed, decode steps with them."""

    checks: Checks
    facts: GraphFacts
    num_heads: int
    windows: tuple[int, ...]
    limit: int

    def texts(self) -> list[list[Text]]:
        """The shorter and the longer one, each in the ways it may be read, the best first."""
        if self.checks.is_fixed:
            return [self._fixed()]
        short = min(self._short, self.limit, self._whole)
        texts = [self._ways("short prompt", short)]
        far = self.limit if self._takes_chunks else min(self.limit, self._whole)
        if far > short:
            texts.append(self._long(far))
        return texts

    def notes(self) -> list[str]:
        """What is not compared, and why."""
        notes, end = [], self.facts.positions
        if self.checks.is_fixed:
            return ["verify: the sizes of a call are fixed: compared in one call of these sizes"]
        far = self.limit if self._takes_chunks else min(self.limit, self._whole)
        if far < self.limit:
            notes.append(
                f"verify: compared up to {far} tokens: a longer prompt, read at once, takes too "
                "much memory"
            )
        if end is not None and end <= max(self.limit, self._dropping_length):
            notes.append(
                f"verify: the source's tables of positions end at {end} tokens: nothing is "
                "compared beyond"
            )
        beyond = [window for window in self.windows if window >= far]
        if beyond:
            notes.append(
                f"verify: compared up to {far} tokens, which is within the source's window of "
                f"{max(beyond)}; --verify-tokens {max(beyond) + _BEYOND} goes beyond it, where "
                "the context allows"
            )
        return notes

    def same_twice(self) -> tuple[Text, Text] | None:
        """A text at once and in chunks, which a kernel that takes chunks gives the same logits.

        None where that is not to be asked: no chunks at all, or none that are in doubt.
        """
        manifest = self.checks.manifest
        asked = self.facts.source_has_it and manifest.has_cache and manifest.chunked_prefill
        if not asked or self.checks.is_fixed:
            return None
        length, rows = min(self._short, self.limit, self._whole), manifest.batch or 1
        ends = chunk_ends(length, length)
        whole = self._text("whole", rows, (length,), length)
        return whole, self._text("chunks", rows, ends, length)

    def brief(self) -> Planner:
        """The same for the shorter text alone."""
        return replace(self, limit=min(self.limit, self._short))

    def with_chunks(self) -> Planner:
        """The same for kernels that take chunks."""
        return replace(self, facts=replace(self.facts, one_token_after_past=False))

    def dropping(self, longest: int | None) -> tuple[Text | None, list[str]]:
        """A prompt of which keys are dropped; or None, and why there is none."""
        manifest = self.checks.manifest
        exact, wanted = manifest.pattern.exact_length, self._dropping_length
        assert exact is not None
        ends_at = (longest, manifest.context_length, self.facts.positions)
        bounds = [bound for bound in ends_at if bound is not None]
        bounds.append(max(self.limit, _FURTHEST_DROP))
        most = self._call_size(wanted, tensors=_BODY_TENSORS)
        if not self._takes_chunks:
            bounds.append(self._largest_whole(_BODY_TENSORS))
        length = min([wanted, *bounds])
        if length <= exact:
            return None, [
                f"verify: nothing is dropped up to {exact} tokens, and no more than {length} can "
                "be read here: kernel and function body were not compared"
            ]
        ends = chunk_ends(length, most) if length > most else (length,)
        name = "long prompt, kernel against function body"
        return self._text(name, manifest.batch or 1, ends, length), []

    def sparse(self, exact: int, longest: int | None) -> tuple[Text | None, list[str]]:
        """A prompt whose rows choose among blocks, in one call; or None, and why there is none.

        Nothing is chosen up to `exact` tokens. Two rows, one of them padded, where that may be.
        """
        manifest = self.checks.manifest
        ends_at = (longest, manifest.context_length, self.facts.positions)
        bounds = [bound for bound in ends_at if bound is not None]
        by_scores = int((_MOST_BYTES / (4 * self.num_heads * _TILE_TENSORS)) ** 0.5)
        length = min([exact + _BEYOND_TILES, by_scores, *bounds])
        pads = _PADS if manifest.left_padding and manifest.batch is None else 0
        if length - pads <= exact:
            return None, [
                f"verify: block-sparse layers choose nothing up to {exact} tokens, and no more "
                f"than {length} can be read here: their choice was not looked at"
            ]
        text = self._text("blocks", manifest.batch or (2 if pads else 1), (length,), length)
        text.mask[1:, :pads] = 0
        return text, []

    @property
    def _dropping_length(self) -> int:
        """Tokens of a prompt of which keys are dropped; 0 where none ever are."""
        manifest = self.checks.manifest
        exact = manifest.pattern.exact_length if manifest.triangle_layers else None
        return 0 if exact is None else exact + _BEYOND

    @property
    def _short(self) -> int:
        beyond = max(self.windows, default=0) + _BEYOND_WINDOW + _STEPS
        return max(_SHORT, beyond) if beyond <= _LONGEST_SHORT else _SHORT

    @property
    def _takes_chunks(self) -> bool:
        manifest = self.checks.manifest
        whole = self.facts.one_token_after_past or not manifest.chunked_prefill
        return manifest.has_cache and not whole

    @property
    def _whole(self) -> int:
        return self._largest_whole(1)

    def _largest_whole(self, tensors: int) -> int:
        """Tokens of the longest prompt that one call may have."""
        by_scores = int((_MOST_BYTES / (4 * self.num_heads * tensors)) ** 0.5)
        return max(2, min(by_scores, _MOST_BYTES // (4 * self.checks.vocabulary)))

    def _call_size(self, total: int, tensors: int = 1) -> int:
        """New tokens that a call over `total` may have."""
        scores = _MOST_BYTES // (4 * self.num_heads * tensors * total)
        return max(1, min(scores, _MOST_BYTES // (4 * self.checks.vocabulary)))

    def _ways(self, name: str, total: int) -> list[Text]:
        """Two rows, one of them padded; two rows; one row."""
        manifest = self.checks.manifest
        rows = manifest.batch or 2
        ends = self._with_steps((self._prompt(total),), total)
        prompt = ends[0]
        texts = []
        padded = manifest.left_padding and rows > 1 and prompt > _PADS + 1
        if padded and not self.facts.dynamic_scales:
            text = self._text(f"{name}, one row padded", rows, ends, prompt)
            text.mask[1, :_PADS] = 0
            texts.append(text)
        texts.append(self._text(name, rows, ends, prompt))
        if manifest.batch is None:
            texts.append(self._text(name, 1, ends, prompt))
        return texts

    def _long(self, total: int) -> list[Text]:
        """In chunks, where the graph takes them; at once, if it can be."""
        rows, prompt = self.checks.manifest.batch or 1, self._prompt(total)
        texts = []
        if self._takes_chunks:
            ends = chunk_ends(prompt, self._call_size(total))
            texts.append(
                self._text("long prompt in chunks", rows, self._with_steps(ends, total), prompt)
            )
        whole = min(prompt, self._whole)
        ends = self._with_steps((whole,), min(total, whole + _STEPS))
        texts.append(self._text("long prompt", rows, ends, whole))
        return texts

    def _fixed(self) -> list[Text]:
        """One call of the sizes that the graph is made for."""
        inputs = self.checks.manifest.inputs
        past, total = fixed_past(inputs) or 0, fixed_total(inputs)
        length = fixed_length(inputs)
        if length is None:
            length = min(_SHORT, self.limit) if total is None else max(1, total - past)
        rows = self.checks.manifest.batch or 1
        return [self._text("prompt of fixed size", rows, (length,), length)]

    def _prompt(self, total: int) -> int:
        steps = min(_STEPS, total - 2) if self.checks.manifest.has_cache else 0
        return total - max(0, steps)

    def _with_steps(self, ends: tuple[int, ...], total: int) -> tuple[int, ...]:
        """And decode steps up to `total`, where there is a cache."""
        if not self.checks.manifest.has_cache:
            return ends
        return (*ends, *range(ends[-1] + 1, total + 1))

    def _text(self, name: str, rows: int, ends: tuple[int, ...], prompt: int) -> Text:
        ids = self.checks.ids(rows, ends[-1])
        return Text(name, ids, np.ones(ids.shape, np.int64), ends, prompt)
