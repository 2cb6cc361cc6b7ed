"""Answers so far, a line a sample, so that an evaluation that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.evaluation.outcome import Outcome

Asked = dict[tuple[str, int], list[Outcome]]
"""By task and seed: the answers of all models that were asked together, in the models' order."""


@dataclass(frozen=True)
class Record:
    """A JSON-lines file. Its first line holds the settings, to which every answer belongs."""

    path: Path
    settings: Mapping[str, Any]

    def load(self) -> Asked:
        """What was asked before; nothing when there is no file yet.

        A line that was cut off is taken away: its sample is asked again, of all models.

        Raises:
            ConfigurationError: the file is of another evaluation; the settings that differ.
        """
        if not self.path.is_file():
            return {}
        text = self.path.read_text(encoding="utf-8")
        whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if not whole:
            self.path.unlink()
            return {}
        self._check(whole[0])
        if len("".join(whole)) != len(text):
            self.path.write_text("".join(whole), encoding="utf-8")
        asked: Asked = {}
        for line in whole[1:]:
            outcomes = [Outcome.from_json(content) for content in json.loads(line)]
            asked[outcomes[0].task, outcomes[0].seed] = outcomes
        return asked

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Keeps the answers to one sample, of all models."""
        begins = not self.path.is_file()
        with self.path.open("a", encoding="utf-8") as file:
            if begins:
                file.write(json.dumps(self.settings) + "\n")
            file.write(json.dumps([asdict(outcome) for outcome in outcomes]) + "\n")

    def remove(self) -> None:
        """Once the report holds it all."""
        self.path.unlink(missing_ok=True)

    def _check(self, line: str) -> None:
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        wanted = json.loads(json.dumps(self.settings))
        if found == wanted:
            return
        if not isinstance(found, dict):
            found = {}
        differing = (name for name in wanted if found.get(name) != wanted[name])
        changed = ", ".join(f"{name} {found.get(name)}, now {wanted[name]}" for name in differing)
        raise ConfigurationError(
            f"{self.path} holds answers of another evaluation that was not finished ({changed}); "
            "delete it, or give another --output"
        )
