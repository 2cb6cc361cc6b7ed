"""Generated models are made once, and an interrupted making leaves nothing that looks finished."""

from __future__ import annotations

from pathlib import Path

import pytest

from source_models.model_cache import cached_folder


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(target: Path) -> None:
        made.append(target)
        (target / "model.onnx").write_text("weights")

    first = cached_folder(tmp_path / "cache", "tiny", ["numpy"], make)
    assert cached_folder(tmp_path / "cache", "tiny", ["numpy"], make) == first
    assert len(made) == 1
    assert [path.name for path in first.iterdir()] == ["model.onnx"]
    assert list(first.parent.iterdir()) == [first]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_nothing(interruption: type[BaseException], tmp_path: Path) -> None:
    def make(target: Path) -> None:
        (target / "half").write_text("weights")
        raise interruption

    with pytest.raises(interruption):
        cached_folder(tmp_path, "tiny", ["numpy"], make)
    assert not list(tmp_path.iterdir())
