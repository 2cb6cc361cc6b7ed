"""Which versions of vLLM the plug-in takes, and on what each was run.

It leans on insides, so a version is taken by name. What differs between them:

    0.26   the CPU backend writes its cache while it attends, and keeps its layout elsewhere;
           shared prefixes may be read by cascade attention
    0.32   neither; backends are asked whether they take the windows by which prompt lengths come
    0.33   as 0.32
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from trianglemix.vllm.errors import ServingError


@dataclass(frozen=True)
class Version:
    """A version of vLLM: the devices whose backends it is taken for, and where we ran it."""

    devices: tuple[str, ...]
    ran_on: tuple[str, ...]


VERSIONS: Final = {
    "0.26": Version(devices=("cuda",), ran_on=("cuda",)),
    "0.32": Version(devices=("cpu", "cuda"), ran_on=("cpu",)),
    "0.33": Version(devices=("cpu", "cuda"), ran_on=()),
}


def is_taken(version: str) -> bool:
    """Whether the plug-in knows this version's insides."""
    return _number(version) in VERSIONS


def _number(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def check_version(version: str, device: str) -> str | None:
    """A warning where we never ran this vLLM on this kind of device, else None.

    Raises:
        ServingError: a version or a device that the plug-in does not take.
    """
    number = _number(version)
    known = VERSIONS.get(number)
    if known is None:
        raise ServingError(
            f"this is vLLM {version}, but TriangleMix takes {', '.join(VERSIONS)} only; install "
            "one of them, or serve without TriangleMix"
        )
    if device not in known.devices:
        raise ServingError(
            f"vLLM {version} runs on {device}, but TriangleMix takes vLLM {number} on "
            f"{' and '.join(known.devices)} only; docs/vllm.md has the table"
        )
    if device not in known.ran_on:
        return (
            f"TriangleMix was never run with vLLM {number} on {device}: its code was compared with "
            "that version's alone; compare answers with a dense server before you rely on it"
        )
    return None
