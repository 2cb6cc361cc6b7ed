"""The probe's results so far, one line a sample, so that a broken run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from trianglemix.analysis.errors import AnalysisError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Result = TypeVar("Result", bound=DataclassInstance)
else:
    Result = TypeVar("Result")
Sample = TypeVar("Sample")


@dataclass(frozen=True)
class Record(Generic[Result]):
    """A JSON-lines file. Its first line holds the settings, to which every sample belongs.

    `kind` is the dataclass of a sample's result, a line each.
    """

    path: Path
    settings: dict[str, Any]
    kind: Callable[..., Result]

    def load(self) -> list[Result]:
        """The samples done so far; none when there is no file yet.

        Raises:
            AnalysisError: the file belongs to another model or other settings.
        """
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        done = [_parsed(line) for line in lines]
        if not done or done[0] != json.loads(json.dumps(self.settings)):
            raise AnalysisError(
                f"{self.path} belongs to another analysis; delete it, or give another output"
            )
        whole = [line for line in done[1:] if line is not None]  # a last line may be cut off
        return [self.kind(**line) for line in whole]

    def save(self, samples: Sequence[Result]) -> None:
        """Writes the settings and all samples, whole or not at all."""
        content = [json.dumps(self.settings), *(json.dumps(asdict(s)) for s in samples)]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("\n".join(content) + "\n", encoding="utf-8")
        temporary.replace(self.path)


def probe_all(
    samples: Sequence[Sample],
    probe: Callable[[Sample], Result],
    record: Record[Result],
    progress: Callable[[int], None],
) -> list[Result]:
    """Probes the samples that the record does not hold yet; tells `progress` how many are done."""
    done = record.load()[: len(samples)]
    progress(len(done))
    for sample in samples[len(done) :]:
        done.append(probe(sample))
        record.save(done)
        progress(len(done))
    return done


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
