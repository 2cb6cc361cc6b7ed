"""The models that a command line names: how each is loaded, and what tells it from others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.evaluation.huggingface import HuggingFaceModel, HuggingFaceOptions
from trianglemix.evaluation.layer_choice import name_of
from trianglemix.evaluation.model import Loader
from trianglemix.manifest.manifest import FILE_NAME as MANIFEST

URL: Final = re.compile(r"https?:", re.IGNORECASE)
"""How an address begins, and no folder that is given beside it."""
_HUGGING_FACE_FILES: Final = ("config.json", "*.safetensors", "*.bin")


@dataclass(frozen=True)
class Entrant:
    """`identity` is what answers that were kept must have been given by, to be taken up again."""

    name: str
    load: Loader
    identity: Mapping[str, Any]


def is_exported(folder: Path) -> bool:
    """Whether `trianglemix-export` wrote the folder."""
    return (folder / MANIFEST).is_file()


def of_folder(
    folder: Path, provider: str, threads: int | None, options: HuggingFaceOptions
) -> Entrant:
    """An exported folder (`provider`, `threads`), or a Hugging Face one (`options`).

    Raises:
        ConfigurationError: the folder is neither.
    """
    name = folder.resolve().name
    if is_exported(folder):
        from trianglemix.evaluation.onnx_model import OnnxModel

        exported = {"folder": _state_of(folder, MANIFEST), "provider": provider, "threads": threads}
        return Entrant(name, lambda: OnnxModel(folder, provider, threads), exported)
    if (folder / "config.json").is_file():
        identity = {"folder": _state_of(folder, *_HUGGING_FACE_FILES), "options": asdict(options)}
        return Entrant(name, lambda: HuggingFaceModel(folder, options), identity)
    raise ConfigurationError(
        f"{folder} is neither a folder of trianglemix-export ({MANIFEST}) nor a Hugging Face model "
        "(config.json); give one of the two"
    )


def dense_beside(folder: Path, chosen: HuggingFaceOptions) -> tuple[Entrant, Entrant]:
    """A Hugging Face folder twice, dense and with layers replaced, its weights held once."""
    plain = HuggingFaceOptions(chosen.device, chosen.dtype)

    @cache
    def load() -> HuggingFaceModel:
        return HuggingFaceModel(folder, chosen)

    def load_dense() -> HuggingFaceModel:
        return HuggingFaceModel(folder, plain, load())

    def entrant(options: HuggingFaceOptions, loader: Loader) -> Entrant:
        identity = {"folder": _state_of(folder, *_HUGGING_FACE_FILES), "options": asdict(options)}
        return Entrant(name_of(options), loader, identity)

    return entrant(plain, load_dense), entrant(chosen, load)


@dataclass(frozen=True)
class Serving:
    """What served models of a command have in common; `timeout` in seconds of silence."""

    tokenizer: Path | None
    tokens: int
    timeout: float


def of_endpoint(url: str, name: str | None, option: str, serving: Serving) -> Entrant:
    """A model behind an OpenAI endpoint: the one of that name, else the only one there is.

    Raises:
        TriangleMixError: the server is not there, or the model, or its tokenizer; its context is
            too short.
    """
    from trianglemix.evaluation.endpoint import Endpoint
    from trianglemix.evaluation.served import (
        ServedModel,
        check_context,
        choose_model,
        find_tokenizer,
    )

    endpoint = Endpoint(url, serving.timeout)
    card = choose_model(endpoint, name, option)
    check_context(endpoint, card, serving.tokens)
    tokenizer, folder = find_tokenizer(card, serving.tokenizer)
    identity = {"served": url, "model": asdict(card), "tokenizer": str(folder.resolve())}
    title = f"{card.name} at {url.split('//', 1)[-1].split('/', 1)[0]}"
    return Entrant(title, lambda: ServedModel(endpoint, card, tokenizer), identity)


def _state_of(folder: Path, *files: str) -> list[Any]:
    """Where it is, and when one of these files of it last changed, in nanoseconds."""
    found = [file.stat().st_mtime_ns for pattern in files for file in folder.glob(pattern)]
    return [str(folder.resolve()), max(found)]
