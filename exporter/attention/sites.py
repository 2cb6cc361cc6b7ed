"""One attention of a graph, whatever its spelling, and how all of them are found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import Final, Protocol

import onnx_ir as ir
from trianglemix.custom_ops.contract import AttentionShape
from trianglemix.custom_ops.graph_builder import GraphBuilder
from trianglemix.exporter.attention.foreign_operators import foreign_attention
from trianglemix.exporter.attention.head_trace import root_of
from trianglemix.exporter.attention.why_no_attention import clue
from trianglemix.exporter.errors import RefusedError
from trianglemix.exporter.graph.roles import GraphRoles
from trianglemix.exporter.graph.walk import content_values, dtype_of

logger = logging.getLogger(__name__)


class Layout(Enum):
    """Axes of a tensor of heads; `FLAT` is `[B, S, heads*D]`."""

    BHSD = "BHSD"
    BSHD = "BSHD"
    BHDS = "BHDS"
    FLAT = "flat"


LAYOUTS: Final = {"BHTD": Layout.BHSD, "BTHD": Layout.BSHD, "BHDT": Layout.BHDS}
"""Layouts by the letters that name axes of keys and values in a walk."""


@dataclass(frozen=True)
class Operand:
    """A value of the graph that holds queries, keys, values or the attention's output."""

    value: ir.Value
    layout: Layout


@dataclass(frozen=True)
class MaskClass:
    """Causal, or causal with a sliding window: row `i` sees keys `j` with `i - j < window`.

    `seen_to`: tokens up to which its piece of the graph runs and was looked at; None where the
    node's own attributes say it for every length.
    """

    window: int | None = None
    seen_to: int | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return "causal" if self.window is None else f"sliding window {self.window}"


@dataclass(frozen=True)
class NodeLengths:
    """Lengths that the site's own node carries, named as in `contract.INPUTS`.

    `prompt_length` None means the end of the row's keys, `first_valid` None means 0.
    """

    seqlens_k: ir.Value
    total_sequence_length: ir.Value
    prompt_length: ir.Value | None = None
    first_valid: ir.Value | None = None


@dataclass(frozen=True)
class AttentionSite:
    """One attention. Queries, keys and values are the new tokens', after RoPE and norms.

    `prologue` holds nodes that are not in the graph yet and must go before the attention (a
    split of packed projections, a rotation that was inside the node). Without `lengths` they
    come from the graph's attention mask, by the rule of a growing cache. `past` and `present` have
    the axes of `cache`, keys and values each. A pattern gives the type of the source's products as
    `dtype`; in what `find_sites` returns it is the type that the operator computes in where caches,
    operands and output have several, and None where they have one.
    """

    layer: int
    form: str
    anchor: ir.Node
    shape: AttentionShape
    scale: float
    softcap: float
    mask: MaskClass
    query: Operand
    key: Operand
    value: Operand
    past: tuple[ir.Value, ir.Value] | None
    present: tuple[ir.Value, ir.Value] | None
    output: Operand
    lengths: NodeLengths | None = None
    prologue: tuple[ir.Node, ...] = ()
    cache: tuple[Layout, Layout] = (Layout.BHSD, Layout.BHSD)
    dtype: ir.DataType | None = None


@dataclass(frozen=True)
class Refusal:
    """Why a node is not taken. `is_attention`: it must be understood, or the export is refused."""

    node: str
    reason: str
    is_attention: bool = True


@dataclass(frozen=True)
class Example:
    """A tiny model in a pattern's spelling, for the shared tests, and what must be found in it."""

    model: ir.Model
    shape: AttentionShape
    num_layers: int
    vocabulary: int


@dataclass
class MatchContext:
    """The graph that patterns look at; it does not change while they do.

    `context_length` (tokens) is what the source says of itself. `shared` holds values of prologue
    nodes that several sites use, by purpose and source value; `masks` what was measured before, by
    everything that a mask is made of: layers mostly share one.
    """

    graph: ir.Graph
    roles: GraphRoles
    context_length: int | None = None
    masks: dict[tuple[object, ...], MaskClass] = field(default_factory=dict)
    shared: dict[tuple[str, ir.Value], ir.Value] = field(default_factory=dict)

    def builder(self, node: ir.Node) -> GraphBuilder:
        """For what has to stand before the site of that node."""
        return self._builder.at(node)

    @cached_property
    def _builder(self) -> GraphBuilder:
        return GraphBuilder(self.graph, "source")

    @cached_property
    def content(self) -> set[ir.Value]:
        """The values that depend on what the graph's inputs hold, not only on their shapes."""
        return content_values(self.graph)


class Pattern(Protocol):
    """One source spelling of attention: a file in `patterns/`."""

    @property
    def name(self) -> str: ...

    @property
    def anchors(self) -> frozenset[tuple[str, str]]:
        """`(domain, op_type)` of the nodes at which a match may start."""

    def match(self, node: ir.Node, context: MatchContext) -> AttentionSite | Refusal:
        """Reads the site at an anchor node (its layer is filled in later)."""

    def example(self) -> Example:
        """A model in this spelling."""


@dataclass(frozen=True)
class Sites:
    """All attentions in graph order, which is layer order, and what looked like one."""

    found: tuple[AttentionSite, ...]
    near_misses: tuple[Refusal, ...]


def find_sites(
    context: MatchContext,
    patterns: Sequence[Pattern],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sites:
    """Matches every anchor node of the graph. Raises nothing for what it refuses: see `Sites`.

    Raises:
        AssertionError: two patterns claim one node (our own defect).
    """
    anchors = list(_anchor_nodes(context.graph, patterns))
    found: list[AttentionSite] = []
    refusals: list[Refusal] = []
    for done, (node, pattern) in enumerate(anchors):
        progress(done, len(anchors))
        match = pattern.match(node, context)
        if isinstance(match, AttentionSite):
            match = _completed(match, found)
        if isinstance(match, Refusal):
            logger.debug("%s: %s", match.node, match.reason)
            refusals.append(match)
        else:
            found.append(match)
    progress(len(anchors), len(anchors))
    foreign = foreign_attention(context.graph, anchors_of(patterns))
    refusals += [Refusal(name, reason) for name, reason in foreign]
    return Sites(tuple(found), tuple(refusals))


def anchors_of(patterns: Sequence[Pattern]) -> frozenset[tuple[str, str]]:
    """`(domain, op_type)` of all nodes at which a match may start."""
    return frozenset().union(*(pattern.anchors for pattern in patterns))


def _completed(site: AttentionSite, earlier: Sequence[AttentionSite]) -> AttentionSite | Refusal:
    """The site with its layer and its type; one that reads an earlier layer's cache has no present.

    Such a layer shares keys and values: it reads the same past and the same new tokens, and what
    it would append is what the earlier layer has appended.
    """
    shares = site.past is not None and any(other.past == site.past for other in earlier)
    found, dtype = _types(site)
    if len(found) > 1 and None in found:
        reason = "the file does not say the types of its queries, keys and values"
        return Refusal(site.anchor.name or site.form, reason)
    present = None if shares else site.present
    return replace(site, layer=len(earlier), present=present, dtype=dtype)


def _types(site: AttentionSite) -> tuple[set[ir.DataType | None], ir.DataType | None]:
    """The types of what the operator reads and makes, and the one to compute in if there are more.

    That is the type of the caches where new tokens join them, or float32 where the source's
    products are in float32.
    """
    stored = site.present or (site.key.value, site.value.value)
    operands = (site.query.value, site.key.value, site.value.value, site.output.value)
    kept = {dtype_of(value) for value in stored}
    found = {*kept, *(dtype_of(value) for value in operands)}
    if len({*found, site.dtype} - {None}) <= 1:
        return {None}, None
    wide = site.dtype == ir.DataType.FLOAT or len(kept) > 1
    return found, ir.DataType.FLOAT if wide else kept.pop()


def check_understood(sites: Sites, context: MatchContext) -> None:
    """Refuses a graph of which some attention, or some cache input, is not understood."""
    refused = [refusal for refusal in sites.near_misses if refusal.is_attention]
    if refused:
        more = f" (and {len(refused) - 1} more; --explain lists them)" if len(refused) > 1 else ""
        raise RefusedError(f"attention at node {refused[0].node}: {refused[0].reason}{more}")
    if not sites.found:
        raise RefusedError(
            "the graph holds no attention that trianglemix knows; --explain lists what came close"
            + clue(context.graph, context.content)
        )
    used = {root_of(value) for site in sites.found for value in site.past or ()}
    for cache in context.roles.caches:
        if cache not in used:
            raise RefusedError(
                f"graph input {cache.name} {cache.shape} looks like a cache, but no attention "
                "that trianglemix knows uses it; --explain lists what came close"
                + clue(context.graph, context.content)
            )


def _anchor_nodes(
    graph: ir.Graph, patterns: Sequence[Pattern]
) -> Iterator[tuple[ir.Node, Pattern]]:
    for node in graph:
        domain = "" if node.domain == "ai.onnx" else node.domain
        claims = [pattern for pattern in patterns if (domain, node.op_type) in pattern.anchors]
        assert len(claims) <= 1, f"patterns {[p.name for p in claims]} claim one node"
        for pattern in claims:
            yield node, pattern
