"""A Hugging Face folder's weights: whole files, and all that its configuration names.

transformers says the rest in its log: a weight that no file holds is random, one that the model
does not know is left out. Nothing here imports torch.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from trianglemix.custom_ops.errors import WeightsError

_SAFE: Final = "model.safetensors"
_PICKLED: Final = "pytorch_model.bin"
_INDEX: Final = ".index.json"
_NAMES: Final = (_SAFE, _SAFE + _INDEX, _PICKLED, _PICKLED + _INDEX)
"""In transformers' own order: the first that is there counts."""
_OTHERS: Final = ("*.safetensors", "*.bin", "*.gguf", "*.h5", "*.msgpack", "*.pt", "*.pth")
_POINTER: Final = b"version https://git-lfs"
_PICKLE: Final = b"\x80"
_WHOLE_NUMBERS: Final = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
_LAYER: Final = re.compile(r"\.(\d+)\.")
_DOWNLOAD: Final = "download it again, and whole"


def check_weight_files(folder: Path) -> None:
    """Holds after it: the folder's files of weights are there, and none is cut off.

    Raises:
        WeightsError: one is not, or they are no model of their own.
    """
    config = read_object(folder / "config.json")
    if (folder / "adapter_config.json").exists():
        raise WeightsError(
            f"{folder} holds an adapter (adapter_config.json), whose weights would be left out; "
            "merge it into its model (peft's merge_and_unload) and give the folder of that, or "
            "remove the file where that was done"
        )
    quantized = bool(config.get("quantization_config"))
    for path in _files(folder, config):
        if is_pointer(path):
            raise WeightsError(
                f"{path} is a Git LFS pointer, not the weights themselves; run git lfs pull there, "
                "or download the file"
            )
        if path.name.endswith(".safetensors"):
            header = _header(path)
            if not quantized:
                _refuse_whole_numbers(path, header)
        else:
            _check_pickled(path)


def check_loaded(folder: Path, model: Any, found: Mapping[str, Iterable[Any]]) -> tuple[str, ...]:
    """Judges what transformers found (`output_loading_info`); returns warnings.

    Raises:
        WeightsError: the model has weights that the files lack, or hold in another size.
    """
    for name, held, wanted in sorted(found.get("mismatched_keys", ())):
        raise WeightsError(
            f"{name} in {folder} has the shape {list(held)}, but config.json makes it "
            f"{list(wanted)}; take both from one model"
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise WeightsError(
            f"{folder} lacks {_counted(missing)}, which config.json asks for and transformers "
            "would fill at random; give a complete folder, with the config.json of its weights"
        )
    unknown = sorted(found["unexpected_keys"])
    if not unknown:
        return ()
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    last = max((int(n) for name in unknown for n in _LAYER.findall(name)), default=-1)
    more = ""
    if isinstance(layers, int) and last >= layers:
        more = f"; config.json counts {layers} layers, but the weights go on to layer {last}"
    return (
        f"{type(model).__name__} has no use for {_counted(unknown)} of the folder, and leaves "
        f"that out{more}: check that config.json is that of the weights",
    )


def is_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS leaves in place of a large one."""
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _counted(names: list[str]) -> str:
    if len(names) == 1:
        return f"the weight {names[0]}"
    return f"{len(names)} weights ({names[0]} to {names[-1]})"


def _files(folder: Path, config: Mapping[str, Any]) -> Iterator[Path]:
    """The files that transformers would read; an index stands for its parts."""
    own = config.get("transformers_weights")
    names = (own,) if isinstance(own, str) else _NAMES
    chosen = next((folder / name for name in names if (folder / name).is_file()), None)
    if chosen is None:
        raise WeightsError(
            f"{folder} holds no weights: none of {', '.join(names)} is a file there"
            f"{_others(folder)}; download the model whole, or save it with transformers' "
            "save_pretrained"
        )
    if not chosen.name.endswith(_INDEX):
        yield chosen
        return
    parts = _parts(chosen)
    lacking = [part for part in parts if not (folder / part).is_file()]
    if lacking:
        raise WeightsError(
            f"{chosen} names {len(parts)} files of weights, of which {len(lacking)} are not there: "
            f"{', '.join(lacking[:3])}{' ...' * (len(lacking) > 3)}; download them"
        )
    yield from (folder / part for part in parts)


def _others(folder: Path) -> str:
    """What else may hold weights, or is a link to what was removed."""
    names = {
        path.name + " (a broken link)" * (not path.exists())
        for pattern in _OTHERS
        for path in folder.glob(pattern)
    }
    return f" (only {', '.join(sorted(names)[:4])})" if names else ""


def _parts(index: Path) -> list[str]:
    parts = read_object(index).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(x, str) for x in parts.values()):
        what = "is a Git LFS pointer, no" if is_pointer(index) else "is no"
        raise WeightsError(f"{index} {what} index of files of weights; {_DOWNLOAD}")
    return sorted(set(parts.values()))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where the file cannot be read as one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _header(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file, by name: 8 bytes with the length of what follows, JSON
    with the place of each tensor, then the tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if 0 < length <= size - 8 else b""
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        end = max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise WeightsError(
            f"{path} ({size} bytes) is cut off, or no safetensors file; {_DOWNLOAD}"
        ) from error
    whole = 8 + length + end
    if size != whole:
        raise WeightsError(
            f"{path} is cut off or broken: it has {size} bytes of {whole}; {_DOWNLOAD}"
        )
    return header


def _refuse_whole_numbers(path: Path, header: Mapping[str, Any]) -> None:
    for name, tensor in header.items():
        if name.endswith(".weight") and tensor.get("dtype") in _WHOLE_NUMBERS:
            raise WeightsError(
                f"{name} in {path} is stored as whole numbers ({tensor['dtype']}), so it is "
                "quantised, but config.json does not say how; give the unquantised model"
            )


def _check_pickled(path: Path) -> None:
    """What torch.save writes is a ZIP file, whose table stands at its end; a pickle of old."""
    with path.open("rb") as file:
        old = file.read(1) == _PICKLE
    if not old and not zipfile.is_zipfile(path):
        raise WeightsError(f"{path} is cut off, or no file of torch.save; {_DOWNLOAD}")
