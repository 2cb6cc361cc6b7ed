"""Rules of ATC's ONNX parser: which operators it reads, and what else it cannot read at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Final

import onnx
from onnx import TensorProto
from trianglemix.custom_ops import contract
from trianglemix.custom_ops.triangle.contract import OP_TYPE
from trianglemix.exporter.targets.ascend.lint_model import (
    LintModel,
    Place,
    Severity,
    place_of,
    rule,
)

_STANDARD: Final = ("", "ai.onnx")
_PARSED_TYPES: Final = frozenset(range(1, 17)) | {
    TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E5M2,
}
OPSET_RANGE: Final = range(11, 19)
"""Versions of the default operator set that the plugins are registered for as a whole."""
_BUILT_IN: Final = frozenset({"Constant"})
"""Handled by the parser itself, at every version."""
_CUSTOM_DOMAINS: Final = {contract.DOMAIN: contract.OP_VERSION, "npu": 1, "mmdeploy": 1}
"""Domains that a plugin may exist for, and the version that its registration names."""
_CUSTOM_OPERATORS: Final = frozenset({(contract.DOMAIN, OP_TYPE)})
"""What our own operator package has a plugin for; nothing else of its domain can be read."""
_PLUGINS: Final = "CANN's open ONNX plugins: their OriginOpType registrations"
_PARSER: Final = "CANN's open parser, onnx_parser.cc: "


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
    if domain in _STANDARD and op_type in _BUILT_IN:
        return frozenset(OPSET_RANGE)
    return _table().get(f"{domain or 'ai.onnx'}::{op_type}", frozenset())


@rule("opset", Severity.ERROR, _PLUGINS)
def _opset(model: LintModel) -> Iterator[Place]:
    version = model.opsets.get("")
    first, last = OPSET_RANGE[0], OPSET_RANGE[-1]
    if version is None or version not in OPSET_RANGE:
        yield (
            model.graph.name or "graph",
            f"opset {version}, but {first} to {last} are read; export at opset {last}",
        )


@rule("operator", Severity.ERROR, f"{_PLUGINS}; atc error E16002")
def _operator(model: LintModel) -> Iterator[Place]:
    for node in model.nodes:
        domain = "" if node.domain in _STANDARD else node.domain
        known = versions_of(domain, node.op_type)
        version = model.opsets.get(domain)
        if (domain, node.op_type) in _CUSTOM_OPERATORS:
            continue  # needs its own plugin: see the rules on custom operators
        if not known:
            name = f"{domain}::{node.op_type}" if domain else node.op_type
            yield place_of(node), f"no plugin reads {name}; write it in listed operators"
        elif version not in known and (domain or version in OPSET_RANGE):
            yield (
                place_of(node),
                f"{node.op_type} is not read at version {version}, only at "
                f"{', '.join(str(v) for v in sorted(known))}",
            )


@rule("domain-version", Severity.ERROR, _PARSER + "the name is domain::version::Type")
def _domain_version(model: LintModel) -> Iterator[Place]:
    for node in model.nodes:
        wanted = _CUSTOM_DOMAINS.get(node.domain)
        version = model.opsets.get(node.domain)
        if wanted is not None and version is not None and version != wanted:
            yield (
                place_of(node),
                f"domain {node.domain} has version {version}, but the plugin's name is "
                f"{node.domain}::{wanted}::{node.op_type}; import version {wanted}",
            )
        elif node.domain not in _STANDARD and version is None:
            yield place_of(node), f"domain {node.domain} is not imported; import its version"


@rule("mixed-domains", Severity.WARNING, _PARSER + "error E16005")
def _mixed_domains(model: LintModel) -> Iterator[Place]:
    if len(model.opsets) > 1:
        domains = ", ".join(sorted(domain or "ai.onnx" for domain in model.opsets))
        used = {node.domain for node in model.nodes}
        unused = [domain for domain in model.opsets if domain and domain not in used]
        advice = f"; remove the unused import {unused[0]}" if unused else ""
        yield (
            model.graph.name or "graph",
            f"imports {domains}: older parsers refuse nodes without a domain then{advice}",
        )


@rule("local-function", Severity.ERROR, "the parser's ge_onnx.proto")
def _local_function(model: LintModel) -> Iterator[Place]:
    for function in model.proto.functions:
        yield (
            f"{function.domain}::{function.name}",
            "a model-local function: the parser's ONNX has none; inline it",
        )


@rule("schema", Severity.ERROR, "ONNX operator schemas of that opset")
def _schema(model: LintModel) -> Iterator[Place]:
    context = onnx.checker.C.CheckerContext()
    context.ir_version = model.proto.ir_version or onnx.IR_VERSION
    context.opset_imports = dict(model.opsets)
    for node in model.nodes:
        if node.domain not in _STANDARD or not versions_of("", node.op_type):
            continue
        try:
            onnx.checker.check_node(node, context)
        except onnx.checker.ValidationError as error:
            yield place_of(node), f"does not fit its opset: {str(error).splitlines()[0]}"


@rule("duplicate-name", Severity.ERROR, "CANN's open parser, pre_checker.cc: E19009")
def _duplicate_name(model: LintModel) -> Iterator[Place]:
    names = Counter(node.name for node in model.nodes if node.name)
    names.update(value.name for value in model.graph.input)
    for name, count in names.items():
        if count > 1:
            yield name, f"{count} nodes or inputs have this name; a name must occur once"


@rule("no-ends", Severity.ERROR, _PARSER + "error E16001")
def _no_ends(model: LintModel) -> Iterator[Place]:
    held = {tensor.name for tensor in model.graph.initializer}
    place = model.graph.name or "graph"
    if not any(value.name not in held for value in model.graph.input):
        yield place, "the graph has no input"
    if not model.graph.output:
        yield place, "the graph has no output"


@rule("parser-type", Severity.ERROR, "CANN's open parser, onnx_util.cc: type table")
def _parser_type(model: LintModel) -> Iterator[Place]:
    for name, info in model.infos.items():
        if info.elem_type and info.elem_type not in _PARSED_TYPES:
            kind = TensorProto.DataType.Name(info.elem_type)
            yield name, f"type {kind} is not in the parser's table; dequantise or cast it"


@rule("input-name", Severity.ERROR, 'atc\'s --input_shape="name:1,2;name:3"')
def _input_name(model: LintModel) -> Iterator[Place]:
    for value in model.graph.input:
        bad = sorted(set(value.name) & set(":;,\"' "))
        if bad:
            yield (
                value.name,
                f"{bad[0]!r} in a name is more than --input_shape can say; rename it",
            )
