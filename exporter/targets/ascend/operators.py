"""Which operators, at which versions, ATC's ONNX parser has plugins for."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Final

from trianglemix.custom_ops import contract

OPSET_RANGE: Final = range(11, 19)
"""Versions of the default operator set that the plugins are registered for as a whole."""
BUILT_IN: Final = frozenset({"Constant"})
"""Handled by the parser itself, at every version."""
CUSTOM_DOMAINS: Final = {contract.DOMAIN: contract.OP_VERSION, "npu": 1, "mmdeploy": 1}
"""Domains that a plugin may exist for, and the version that its registration names."""
CUSTOM_OPERATORS: Final = frozenset({(contract.DOMAIN, contract.OP_TYPE)})
"""What our own operator package has a plugin for; nothing else of its domain can be read."""


@cache
def _table() -> dict[str, frozenset[int]]:
    text = resources.files(__package__).joinpath("operators.txt").read_text(encoding="utf-8")
    lines = (line.split() for line in text.splitlines() if not line.startswith("#"))
    return {name: frozenset(_versions(spec)) for name, spec in lines}


def _versions(spec: str) -> list[int]:
    """`8,12-18` as numbers."""
    found: list[int] = []
    for part in spec.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def versions_of(domain: str, op_type: str) -> frozenset[int]:
    """The versions at which the parser knows the operator; empty where it never does."""
    if domain in ("", "ai.onnx") and op_type in BUILT_IN:
        return frozenset(OPSET_RANGE)
    return _table().get(f"{domain or 'ai.onnx'}::{op_type}", frozenset())
