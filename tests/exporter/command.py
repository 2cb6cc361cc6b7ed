"""Runs `trianglemix-export` in this process, and looks at how it ended."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from trianglemix.exporter import cli

Captured = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def run_main(monkeypatch: Patch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["trianglemix-export", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def assert_failed(capsys: Captured, root: Path, *words: str) -> None:
    """One line on stderr with these words, no output folder, nothing unfinished."""
    error = capsys.readouterr().err
    lines = error.splitlines()
    assert len(lines) == 1, error
    assert lines[0].startswith("trianglemix-export: error: ")
    for word in words:
        assert word in lines[0], lines[0]
    assert "Traceback" not in error
    assert not (root / "out").exists()
    assert not list(root.glob(".out*"))
