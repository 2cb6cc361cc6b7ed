"""Draws one odd model from a seed: a mask, a scale, a spelling of its nodes, an interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np

from tests.odd.masks import BUFFER, MASKS, SEGMENTS, Family
from tests.odd.scales import SCALES

HEADS: Final = 4
HEAD_SIZE: Final = 16
HIDDEN: Final = 48
VOCABULARY: Final = 83
NODE_ATTRIBUTES: Final[dict[str, tuple[str, ...]]] = {
    "attention": ("softcap", "scale"),
    "group_query": ("softcap", "scale", "smooth_softmax", "head_sink", "attention_bias"),
}
"""What the nodes of a spelling may have beside the usual."""
CARRIED_ATTRIBUTES: Final = ("none", "softcap", "scale")
CAP: Final = 5.0
_EXTRAS: Final = (
    "router_first",  # an output with logits in its name before the logits
    "token_types",
    "cache_position",
    "temperature",  # an input that nobody knows
    "convolution",  # with a state of its own
    "keep_logits",
    "last_row",
)
_OLD: Final = (17, 18, 20, 21) * 6 + (14, 15)
"""Opsets below 17 are refused by name, so they are rare."""


@dataclass(frozen=True)
class OddModel:
    """Every choice of one generated decoder; see `decoder.write_model`.

    `window_layers` are the layers that have `mask`; the others are causal.
    """

    seed: int
    mask: str
    size: int  # window, chunk or threshold of mask and scale; a token id where ids decide
    scale: str
    window_layers: tuple[int, ...]
    num_layers: int
    spelling: str  # softmax, einsum, batched, attention, group_query
    repeat: str  # how K/V heads become query heads
    kv_heads: int
    opset: int
    dtype: str
    mask_form: str  # where, add: how the bool mask reaches the scores
    cache: str  # none, BHTD, BTHD
    cache_dtype: str
    ids_dtype: str
    mask_dtype: str
    positions: str  # none, slots, rank1, rank2, rank3
    batch: int | str
    present: str  # joined, identity, cast
    extra: str  # "nothing", or one of _EXTRAS
    attribute: str  # of an attention node: "none", or one of NODE_ATTRIBUTES
    storage: str  # inside, one_file, each_file
    branches: bool  # the tables of the rotation lie in an If that asks for the length
    shares: bool  # the last layer reads the keys and values of the first
    shapes: bool  # whether the file says the shapes of values inside
    shuffled: bool
    stated: bool = True  # whether the caches say their heads and head size

    @property
    def family(self) -> Family:
        """What the exporter owes it as far as its mask goes."""
        return MASKS[self.mask].family

    @property
    def mask_is_carried(self) -> bool:
        return self.family != "other"

    @property
    def can_be_exported(self) -> bool:
        """Whether mask and scale are what the operator can say."""
        carried = self.attribute in CARRIED_ATTRIBUTES
        return self.mask_is_carried and SCALES[self.scale].carried and carried

    @property
    def factor(self) -> float:
        """What scores are multiplied with."""
        return 0.2 if self.attribute == "scale" else HEAD_SIZE**-0.5

    @property
    def cached_layers(self) -> range:
        """Layers that have keys and values of their own in the cache."""
        if self.cache == "none":
            return range(0)
        return range(self.num_layers - 1 if self.shares else self.num_layers)

    def cache_shape(self, tokens: str) -> tuple[int | str, ...]:
        """`[B, G, tokens, D]` as the file has it; names where it states no number."""
        heads, size = (self.kv_heads, HEAD_SIZE) if self.stated else ("kv_heads", "head_size")
        return (self.batch, heads, tokens, size)

    @property
    def tolerance(self) -> float:
        """How far two runs may be apart, as a share of the largest logit."""
        half = self.dtype == "float16" or (self.cache_dtype == "float16" and self.cache != "none")
        return 3e-2 if half else 1e-3

    @property
    def reach(self) -> int:
        """Tokens up to which it is compared: four windows, as far as its own buffers go."""
        longest = 4 * self.size + 8
        return min(longest, BUFFER - 8) if MASKS[self.mask].buffered else longest


def _pick(random: np.random.Generator, usual: object, *odd: object, chance: float = 0.35) -> object:
    return odd[random.integers(len(odd))] if odd and random.random() < chance else usual


def draw_model(seed: int) -> OddModel:
    """The model of a seed; half of them have one odd thing alone, the others several at once."""
    random = np.random.default_rng([20261127, seed])
    pick = partial(_pick, random)
    crowded = 1.0 if seed % 2 else 0.25  # how much else is odd beside the mask
    cache = pick("BHTD", "none", "BTHD", chance=0.3 * crowded)
    mask = _draw_mask(random, cached=cache != "none")
    scale = _draw_scale(random)
    size = _draw_size(random, mask, cached=cache != "none")
    spelling = pick("softmax", "einsum", "batched", "attention", chance=0.5 * crowded)
    if mask in ("causal", "less") and cache == "BHTD" and random.random() < 0.25:
        spelling = "group_query"  # its window is an attribute
    fancy = spelling in ("attention", "group_query")
    scale = "times" if fancy else scale
    layers = int(random.integers(2, 4))
    dtype = str(pick("float32", "float16", chance=0.15 * crowded))
    dtype = "float32" if spelling == "group_query" else dtype
    other_cache = () if spelling == "group_query" else ("float16",)
    kv_heads = int(pick(2, 4, 1, chance=0.4))
    attribute = pick("none", *NODE_ATTRIBUTES.get(str(spelling), ()), chance=0.4)
    model = OddModel(
        seed=seed,
        mask=mask,
        size=size,
        scale=scale,
        window_layers=_draw_layers(random, layers),
        num_layers=layers,
        spelling=str(spelling),
        repeat=str("inside" if fancy else _draw_repeat(random, kv_heads)),
        kv_heads=kv_heads,
        opset=23 if spelling == "attention" else int(pick(18, *_OLD, chance=0.6)),
        dtype=dtype,
        mask_form=str(pick("where", "add", "where_after", "arithmetic", chance=0.5)),
        cache=str("BHTD" if spelling == "group_query" else cache),
        cache_dtype=str(pick(dtype, *other_cache, chance=0.15 * crowded)),
        ids_dtype=str(pick("int64", "int32", chance=0.3 * crowded)),
        mask_dtype=str(pick("int64", "int32", "float32", "bool", chance=0.4 * crowded)),
        positions=str(pick("rank2", "slots", "none", "rank1", "rank3", chance=0.5 * crowded)),
        batch="batch" if random.random() > 0.2 * crowded else 1,
        present=str(pick("joined", "identity", "cast", chance=0.25 * crowded)),
        extra=str(pick("nothing", *_EXTRAS, chance=0.35 * crowded)),
        attribute=str(attribute),
        storage=str(pick("inside", "one_file", "each_file", chance=0.3 * crowded)),
        branches=bool(random.random() < 0.15 * crowded),
        shares=bool(spelling != "group_query" and random.random() < 0.1 * crowded),
        stated=bool(random.random() > 0.12 * crowded),
        shapes=bool(random.random() < 0.5),
        shuffled=bool(random.random() < 0.25 * crowded),
    )
    return _with_segments(random, model) if random.random() < 0.04 else model


def _with_segments(random: np.random.Generator, model: OddModel) -> OddModel:
    """A mask by numbers of documents: drawn last, so that no other seed's model changes."""
    if model.spelling == "group_query":
        return model
    dtype = "int64" if model.mask_dtype == "bool" else model.mask_dtype
    return replace(model, mask=SEGMENTS[random.integers(len(SEGMENTS))], mask_dtype=dtype)


def _draw_mask(random: np.random.Generator, *, cached: bool) -> str:
    kinds: Sequence[str] = [
        name
        for name, kind in MASKS.items()
        if cached <= (not kind.uncached) and name not in SEGMENTS
    ]
    if random.random() < 0.2:
        return "causal"
    return str(kinds[random.integers(len(kinds))])


def _draw_scale(random: np.random.Generator) -> str:
    carried = [name for name, kind in SCALES.items() if kind.carried]
    others = [name for name, kind in SCALES.items() if not kind.carried]
    among = others if random.random() < 0.1 else carried
    return among[random.integers(len(among))]


def _draw_size(random: np.random.Generator, mask: str, *, cached: bool) -> int:
    """Small ones, which whole prompts show, and far ones, which only a long past can."""
    kind = MASKS[mask]
    if kind.uncached:
        return int(random.integers(3, VOCABULARY))
    near = not cached or kind.buffered or mask == "trilu"  # which is square
    if kind.power:
        return 2 ** int(random.integers(3, 7 if near else 13))
    longest = 100 if not cached else 240 if near or random.random() < 0.7 else 4000
    return int(random.integers(5, longest))


def _draw_layers(random: np.random.Generator, layers: int) -> tuple[int, ...]:
    """All, or all but one, which then is causal."""
    every = tuple(range(layers))
    left_out = int(random.integers(layers))
    return every if random.random() < 0.4 else tuple(x for x in every if x != left_out)


def _draw_repeat(random: np.random.Generator, kv_heads: int) -> str:
    if kv_heads == HEADS:
        return "inside"
    kinds = ["expand", "gather", "concat", "tile"] + (["broadcast"] if kv_heads == 1 else [])
    return kinds[random.integers(len(kinds))]
