"""Breaks a model in one random place: what a bad exporter, a fuser or an editor might do to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import onnx_ir as ir

Random = np.random.Generator
Mutation = Callable[[ir.Model, Random], str]
"""Changes the model in place and says what it did."""


def mutate(model: ir.Model, random: Random) -> str:
    """One to three mutations, named."""
    count = int(random.integers(1, 4))
    return "; ".join(
        _MUTATIONS[random.integers(len(_MUTATIONS))](model, random) for _ in range(count)
    )


def _node(model: ir.Model, random: Random, *op_types: str) -> ir.Node | None:
    nodes = [node for node in model.graph if not op_types or node.op_type in op_types]
    return nodes[int(random.integers(len(nodes)))] if nodes else None


def drop_node(model: ir.Model, random: Random) -> str:
    """A node's readers read its first input instead."""
    node = _node(model, random)
    if node is None or not node.inputs or node.inputs[0] is None:
        return "nothing to drop"
    if any(value.is_graph_output() for value in node.outputs):
        return f"kept {node.op_type}, which makes an output"
    for value in node.outputs:
        value.replace_all_uses_with(node.inputs[0])
    model.graph.remove(node, safe=True)
    return f"dropped {node.op_type} {node.name}"


def swap_inputs(model: ir.Model, random: Random) -> str:
    """Two inputs of a node change places."""
    node = _node(model, random)
    if node is None or len(node.inputs) < 2:
        return "nothing to swap"
    a, b = random.choice(len(node.inputs), 2, replace=False)
    first, second = node.inputs[a], node.inputs[b]
    node.replace_input_with(int(a), second)
    node.replace_input_with(int(b), first)
    return f"swapped inputs {a} and {b} of {node.op_type} {node.name}"


def rewire_input(model: ir.Model, random: Random) -> str:
    """An input of a node becomes some value that was made before it."""
    node = _node(model, random)
    if node is None or not node.inputs:
        return "nothing to rewire"
    before: list[ir.Value] = [*model.graph.inputs]
    for other in model.graph:
        if other is node:
            break
        before += other.outputs
    index = int(random.integers(len(node.inputs)))
    value = before[int(random.integers(len(before)))]
    node.replace_input_with(index, value)
    return f"input {index} of {node.op_type} {node.name} is now {value.name}"


def omit_input(model: ir.Model, random: Random) -> str:
    """An input of a node is left out."""
    node = _node(model, random)
    if node is None or not node.inputs:
        return "nothing to leave out"
    index = int(random.integers(len(node.inputs)))
    node.replace_input_with(index, None)
    return f"left out input {index} of {node.op_type} {node.name}"


def change_operator(model: ir.Model, random: Random) -> str:
    """A node becomes a relative of itself."""
    node = _node(model, random, *_RELATIVES)
    if node is None:
        return "no operator to change"
    old, node.op_type = node.op_type, _RELATIVES[node.op_type]
    return f"{old} {node.name} became {node.op_type}"


def change_attribute(model: ir.Model, random: Random) -> str:
    """A number among a node's attributes changes."""
    nodes = [node for node in model.graph if any(_numeric(a) for a in node.attributes.values())]
    if not nodes:
        return "no attribute to change"
    node = nodes[int(random.integers(len(nodes)))]
    names = [name for name, attribute in node.attributes.items() if _numeric(attribute)]
    name = names[int(random.integers(len(names)))]
    attribute = node.attributes[name]
    if attribute.type is ir.AttributeType.INT:
        node.attributes[name] = ir.AttrInt64(name, attribute.as_int() + int(random.integers(-2, 3)))
    elif attribute.type is ir.AttributeType.FLOAT:
        node.attributes[name] = ir.AttrFloat32(name, attribute.as_float() * 1.5 + 0.1)
    else:
        shuffled = [int(x) for x in random.permutation(list(attribute.as_ints()))]
        node.attributes[name] = ir.AttrInt64s(name, shuffled)
    return f"{name} of {node.op_type} {node.name} is now {node.attributes[name].value}"


def change_constant(model: ir.Model, random: Random) -> str:
    """A small constant changes its value."""
    small = [
        value for value in model.graph.initializers.values()
        if value.const_value is not None and 0 < value.const_value.size <= 16
    ]  # fmt: skip
    if not small:
        return "no constant to change"
    value = small[int(random.integers(len(small)))]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    flat = array.reshape(-1)
    index = int(random.integers(flat.size))
    if array.dtype == np.bool_:
        flat[index] = ~flat[index]
    else:
        with np.errstate(over="ignore"):  # "all the rest" of a Slice is the largest integer
            flat[index] = flat[index] + random.choice([-1, 1, 2])
    value.const_value = ir.tensor(array, name=value.name)
    return f"constant {value.name}[{index}] is now {flat[index]}"


def change_type(model: ir.Model, random: Random) -> str:
    """A Cast goes to another type, or an input states another one."""
    node = _node(model, random, "Cast")
    types = [ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.FLOAT16]
    chosen = types[int(random.integers(len(types)))]
    if node is not None and random.random() < 0.5:
        node.attributes["to"] = ir.AttrInt64("to", int(chosen))
        return f"Cast {node.name} goes to {chosen.name}"
    value = model.graph.inputs[int(random.integers(len(model.graph.inputs)))]
    value.type = ir.TensorType(chosen)
    return f"input {value.name} is {chosen.name}"


def duplicate_name(model: ir.Model, random: Random) -> str:
    """Two nodes, or two values, get one name."""
    nodes = list(model.graph)
    a, b = random.choice(len(nodes), 2, replace=False)
    nodes[a].name = nodes[b].name
    if random.random() < 0.5:
        nodes[a].outputs[0].name = nodes[b].outputs[0].name
        return f"two values are called {nodes[b].outputs[0].name}"
    return f"two nodes are called {nodes[b].name}"


def loosen_dimension(model: ir.Model, random: Random) -> str:
    """A dimension, or a whole shape, is no longer stated."""
    values = [*model.graph.inputs, *model.graph.outputs]
    values += [value for node in model.graph for value in node.outputs if value.shape is not None]
    value = values[int(random.integers(len(values)))]
    if value.shape is None or random.random() < 0.3:
        value.shape = None
        return f"{value.name} states no shape"
    axis = int(random.integers(max(1, len(value.shape))))
    dims = list(value.shape)
    if dims:
        dims[axis] = random.choice(["anything", "batch", "2"])
    value.shape = ir.Shape(dims)
    return f"{value.name} states {value.shape}"


def rename_interface(model: ir.Model, random: Random) -> str:
    """An input or an output gets a name that says nothing."""
    values = [*model.graph.inputs, *model.graph.outputs]
    value = values[int(random.integers(len(values)))]
    old, value.name = value.name, f"x{random.integers(1000)}"
    return f"{old} is now called {value.name}"


def drop_output(model: ir.Model, random: Random) -> str:
    """An output of the graph goes away."""
    index = int(random.integers(len(model.graph.outputs)))
    name = model.graph.outputs[index].name
    del model.graph.outputs[index]
    return f"output {name} is gone"


def _numeric(attribute: ir.Attr) -> bool:
    kinds = (ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.INTS)
    return attribute.type in kinds


_RELATIVES: Final = {
    "Add": "Sub", "Sub": "Add", "Mul": "Div", "Div": "Mul", "And": "Or", "LessOrEqual": "Less",
    "Less": "LessOrEqual", "Softmax": "LogSoftmax", "ReduceMean": "ReduceSum", "Cos": "Sin",
    "Sigmoid": "Tanh", "Tanh": "Sigmoid", "Unsqueeze": "Squeeze", "Max": "Min",
    "ReduceSum": "ReduceMax", "Neg": "Identity", "Identity": "Neg", "Where": "Mul",
}  # fmt: skip
_MUTATIONS: Final[Sequence[Mutation]] = (
    drop_node, swap_inputs, rewire_input, omit_input, change_operator, change_attribute,
    change_constant, change_type, duplicate_name, loosen_dimension, rename_interface, drop_output,
)  # fmt: skip
