"""Every planted fault is seen by the generator: models that ended well end otherwise with it."""

from __future__ import annotations

from itertools import islice

import pytest

from tests.odd.odd_model import draw_model
from tests.odd.planted import PLANTS
from tests.odd.trial import Outcome, run_trial

_MODELS = 4
_WELL = (Outcome.RIGHT, Outcome.NOT_RUN, Outcome.REFUSED)


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant = PLANTS[name]
    models = (draw_model(seed) for seed in range(20_000))
    seeds = [model.seed for model in islice(filter(plant.shows, models), _MODELS)]
    assert len(seeds) == _MODELS
    before = [run_trial(seed, plant.depth) for seed in seeds]
    assert all(trial.outcome in _WELL for trial in before), before
    for owner, attribute, fault in plant.faults:
        monkeypatch.setattr(owner, attribute, fault)
    after = [run_trial(seed, plant.depth) for seed in seeds]
    changed = [b for a, b in zip(before, after, strict=True) if a.outcome is not b.outcome]
    assert changed, [trial.detail for trial in after]
