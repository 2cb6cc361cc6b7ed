"""The list of operators: what the exporter and the runtime ask of all of them."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import TYPE_CHECKING

import trianglemix.custom_ops
from trianglemix.custom_ops import contract

if TYPE_CHECKING:
    import onnx_ir as ir


@cache
def folders() -> dict[str, str]:
    """By each operator's name its folder: those here that have a `contract` with its `OP_TYPE`."""
    found = (x.name for x in iter_modules(trianglemix.custom_ops.__path__) if x.ispkg)
    contracts = {name: f"{__package__}.{name}.contract" for name in found}
    return {import_module(x).OP_TYPE: name for name, x in contracts.items() if find_spec(x)}


def is_ours(domain: str, name: str) -> bool:
    """Whether a node's or a function's domain and name are one of the operators'."""
    return domain == contract.DOMAIN and name in folders()


def add_function(model: ir.Model, op_type: str) -> None:
    """Gives the model what the operator means in standard operators, and the operators' opset.

    The function has the outputs that the graph's nodes have: ONNX Runtime takes no node that leaves
    out one of its function's.
    """
    module = import_module(f"{__package__}.{folders()[op_type]}.function_body")
    function: ir.Function = module.build_function()
    nodes = (node for node in model.graph if node.op_identifier() == function.identifier())
    del function.outputs[max((len(node.outputs) for node in nodes), default=None) :]
    model.functions[function.identifier()] = function
    model.graph.opset_imports[contract.DOMAIN] = contract.OP_VERSION
