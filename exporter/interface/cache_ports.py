"""Where the caches of attentions enter and leave the graph, behind casts, transposes and slices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import onnx_ir as ir
from trianglemix.exporter.attention.sites import AttentionSite
from trianglemix.exporter.graph.walk import is_op, optional_input, small_constant
from trianglemix.manifest.manifest import LayerCache

_AXES: Final = (0, 1, 2, 3)  # of a cache, as its site has them
_TOKENS: Final = "S"  # in the letters of a `Layout`
_FAR: Final = 2**31 - 1  # an end beyond every length


@dataclass(frozen=True)
class CachePort:
    """A graph input that holds a layer's past, and the graph output that holds it afterwards.

    `output` None: no output does. `appends`: the output holds the call's new tokens alone. The
    input's axes are the output's in the order `permutation` (None: as they are). `limit`: the
    output keeps so many tokens, the last ones. `sizes` of the input's axes, as far as the
    attention tells them.
    """

    layer: int
    is_key: bool
    input: str
    token_axis: int
    output: str | None = None
    permutation: tuple[int, ...] | None = None
    appends: bool = False
    limit: int | None = None
    sizes: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class _Link:
    """A value on the way back from another one, whose axis `i` is axis `axes[i]` of this one.

    `kept`: of axis `kept_axis` of the other one only the last `kept` places are there.
    """

    value: ir.Value
    axes: tuple[int, ...] = _AXES
    kept: int | None = None
    kept_axis: int | None = None


def find_ports(graph: ir.Graph, sites: Sequence[AttentionSite]) -> tuple[CachePort, ...]:
    """A port for every graph input that some site's past comes from, before the graph changes.

    Layers that attend another layer's keys and values have no port of their own.
    """
    outputs = [(value, list(_links(value))) for value in graph.outputs]
    ports: dict[str, CachePort] = {}
    for site in sites:
        for index, past in enumerate(site.past or ()):
            found = _input_port(site, index, past)
            if found is None or found[0].input in ports:
                continue
            port, entry = found
            present = None if site.present is None else site.present[index]
            new = (site.key, site.value)[index]
            letters = site.cache[index].value
            whole = None
            if present is not None:
                whole = _with_output(port, entry, (present, letters), outputs)
            if whole is None and new.layout is site.cache[index]:
                part = _with_output(port, entry, (new.value, letters), outputs)
                whole = None if part is None else replace(part, appends=True)
            ports[port.input] = whole or port
    return tuple(ports.values())


def layer_caches(
    sites: Sequence[AttentionSite], ports: Sequence[CachePort]
) -> tuple[LayerCache, ...]:
    """Graph names of each layer's cache, for layers that have one that the graph gives back."""
    pairs: dict[int, dict[bool, CachePort]] = {}
    for port in ports:
        if port.output is not None:
            pairs.setdefault(port.layer, {})[port.is_key] = port
    caches = []
    for site in sites:
        pair = pairs.get(site.layer, {})
        if len(pair) == 2:
            key, value = pair[True], pair[False]
            assert key.output is not None
            assert value.output is not None
            caches.append(
                LayerCache(
                    layer=site.layer,
                    past_key=key.input,
                    past_value=value.input,
                    present_key=key.output,
                    present_value=value.output,
                    kv_num_heads=site.shape.kv_num_heads,
                    head_size=site.shape.head_size,
                    value_head_size=site.shape.value_head_size,
                )
            )
    return tuple(caches)


def _input_port(site: AttentionSite, index: int, past: ir.Value) -> tuple[CachePort, _Link] | None:
    for link in _links(past):
        if link.value.is_graph_input() and link.kept is None:
            letters = site.cache[index].value
            size = (site.shape.head_size, site.shape.value_head_size)[index]
            known = {"H": site.shape.kv_num_heads, "D": size}
            sizes = tuple(known.get(letters[link.axes.index(axis)]) for axis in _AXES)
            axis = link.axes[letters.index(_TOKENS)]
            return CachePort(site.layer, index == 0, str(link.value.name), axis, sizes=sizes), link
    return None


def _with_output(
    port: CachePort,
    entry: _Link,
    wanted: tuple[ir.Value, str],
    outputs: Sequence[tuple[ir.Value, list[_Link]]],
) -> CachePort | None:
    """The port with the output that is made of `wanted`, a present or the new tokens."""
    made_of, letters = wanted
    for output, links in outputs:
        for link in links:
            if link.value is not made_of or output is entry.value:
                continue
            if link.kept_axis is not None and letters[link.axes[link.kept_axis]] != _TOKENS:
                continue
            order = tuple(link.axes.index(entry.axes.index(axis)) for axis in _AXES)
            return replace(
                port,
                output=str(output.name),
                permutation=None if order == _AXES else order,
                limit=link.kept,
            )
    return None


def _links(value: ir.Value) -> Iterator[_Link]:
    """The value, and those before it as long as only axes, type or length change."""
    link = _Link(value)
    while True:
        yield link
        node = link.value.producer()
        before = None if node is None else optional_input(node, 0)
        if node is None or before is None:
            return
        if is_op(node, "Transpose"):
            perm = node.attributes.get_ints("perm", list(reversed(_AXES)))
            if len(perm) != len(_AXES):
                return
            link = replace(link, value=before, axes=tuple(perm[axis] for axis in link.axes))
        elif is_op(node, "Cast", "Identity"):
            link = replace(link, value=before)
        elif is_op(node, "Slice") and link.kept is None:
            found = _last_places(node)
            if found is None:
                return
            kept, axis = found
            link = replace(link, value=before, kept=kept, kept_axis=link.axes.index(axis))
        else:
            return


def _last_places(node: ir.Node) -> tuple[int, int] | None:
    """`(number, axis)` of a Slice that keeps the last places of one axis; None for any other."""
    given = [small_constant(optional_input(node, index), limit=1) for index in range(1, 5)]
    starts, ends, axes, steps = (None if x is None else int(x.reshape(-1)[0]) for x in given)
    if starts is None or ends is None or axes is None or steps not in (None, 1):
        return None
    if len(node.inputs) > 4 and node.inputs[4] is not None and steps is None:
        return None
    if starts >= 0 or ends < _FAR:
        return None
    return -starts, axes % len(_AXES)
