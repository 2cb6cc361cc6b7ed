"""Tiny exported folders, built once per kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from trianglemix.custom_ops import library
from trianglemix.custom_ops.library import LibraryNotFoundError
from trianglemix.runtime import TriangleSession
from trianglemix.runtime.backends import ort as ort_backend

from tests.runtime.tiny_folder import TinyFolder, build_folder

FolderMaker = Callable[[TinyFolder], Path]


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> FolderMaker:
    built: dict[TinyFolder, Path] = {}

    def make(spec: TinyFolder) -> Path:
        if spec not in built:
            built[spec] = build_folder(tmp_path_factory.mktemp("tiny"), spec)
        return built[spec]

    return make


@pytest.fixture(scope="session")
def folder(make_folder: FolderMaker) -> Path:
    """The plain case: shared cache, last-token logits, two triangle layers of three."""
    return make_folder(TinyFolder())


@pytest.fixture
def session(folder: Path) -> TriangleSession:
    """A session on the native kernel."""
    return TriangleSession.from_folder(folder, provider="cpu", threads=1)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without the native library."""

    def missing() -> Path:
        raise LibraryNotFoundError(f"{library.LIBRARY_NAME} is not in this installation")

    monkeypatch.setattr(ort_backend, "library_path", missing)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids, special tokens left out."""
    return np.random.default_rng((seed, length)).integers(0, 256, length).tolist()
