"""`TriangleMixConfig`: pattern and rule, each with the layers that use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.contract import check_count
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.triangle.contract import TrianglePattern

_CHOICES = ("num_triangle_layers", "triangle_layer_indices", "starting_layer")


@dataclass(frozen=True)
class TriangleMixConfig:
    """The pattern and the layers that use it, the rule and its layers. Layers count from 0.

    The three numbers have the operator's meaning: `keep(i, j) = j <= i and (j < num_sink_tokens or
    i - j < sliding_window_size or i >= N - num_last_tokens)`. Other people's numbers go through the
    `from_...` methods, one per spelling.

    At most one of these says which layers: `num_triangle_layers` (that many of the *deepest*
    layers, never the first), `triangle_layer_indices` (exactly these, for example the plan of
    `trianglemix-analyze`) or `starting_layer` (this layer to the last).

    `block_sparse_layer_indices` are layers in which each head keeps the blocks of keys that hold
    most of its attention, by `block_rule`; none without them. No layer is both.

    Tuning, as the reference card advises for short prompts (unmeasured here): sinks 4 to 8, at most
    16; window 32 to 64, at most 128; last rows 64 to 128, at most 256, about twice the window; 4 to
    20 layers. For prompts beyond 4K raise all three. The defaults are those of the paper's
    experiments at 128K. More triangle layers are faster, fewer are safer.

    Raises:
        ConfigurationError: a value out of range, or two ways of naming the layers at once.
    """

    num_sink_tokens: int = TrianglePattern.num_sink_tokens
    sliding_window_size: int = TrianglePattern.sliding_window_size
    num_last_tokens: int = TrianglePattern.num_last_tokens
    num_triangle_layers: int | None = None
    triangle_layer_indices: Sequence[int] | None = None
    starting_layer: int | None = None
    block_sparse_layer_indices: Sequence[int] = ()
    block_rule: BlockRule = field(default_factory=BlockRule)

    def __post_init__(self) -> None:
        _ = self.pattern  # checks the three numbers
        given = [name for name in _CHOICES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigurationError(
                f"{' and '.join(given)} are given together; name the layers in one way only"
            )
        for name in ("num_triangle_layers", "starting_layer"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigurationError(f"{name} is {value}, but must be 0 or more")
        for name in ("triangle_layer_indices", "block_sparse_layer_indices"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _sorted_indices(name, getattr(self, name)))

    @property
    def pattern(self) -> TrianglePattern:
        """The three numbers as the operator takes them."""
        return TrianglePattern(self.num_sink_tokens, self.sliding_window_size, self.num_last_tokens)

    def triangle_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers of a model of `num_layers` layers that use the pattern, ascending.

        Raises:
            ConfigurationError: no layers are named, or the model has not that many.
        """
        if self.triangle_layer_indices is not None:
            layers = tuple(self.triangle_layer_indices)
        elif self.num_triangle_layers is not None:
            layers = tuple(range(num_layers - self.num_triangle_layers, num_layers))
        elif self.starting_layer is not None:
            layers = tuple(range(self.starting_layer, num_layers))
        elif self.block_sparse_layer_indices:
            layers = ()
        else:
            raise ConfigurationError(
                "the configuration does not say which layers are triangle layers; set "
                f"{', '.join(_CHOICES[:-1])} or {_CHOICES[-1]} (trianglemix-analyze finds them)"
            )
        if any(not 0 <= layer < num_layers for layer in layers):
            name = next(name for name in _CHOICES if getattr(self, name) is not None)
            raise ConfigurationError(
                f"{name} {getattr(self, name)} asks for layers that a model of {num_layers} layers "
                f"(0-{num_layers - 1}) has not; use a configuration made for this model"
            )
        return layers

    def block_sparse_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers of a model of `num_layers` layers that use the rule, ascending.

        Raises:
            ConfigurationError: the model has not that many, or one of them is a triangle layer.
        """
        layers = tuple(self.block_sparse_layer_indices)
        if layers and layers[-1] >= num_layers:
            raise ConfigurationError(
                f"block_sparse_layer_indices has layer {layers[-1]}, but the model has "
                f"{num_layers} layers (0-{num_layers - 1})"
            )
        both = sorted(set(layers) & set(self.triangle_layers(num_layers))) if layers else []
        if both:
            raise ConfigurationError(
                f"layers {both} are named as triangle layers and as block-sparse ones; a layer is "
                "one of the two"
            )
        return layers

    @classmethod
    def from_pattern(
        cls, pattern: TrianglePattern, triangle_layer_indices: Sequence[int] | None = None
    ) -> TriangleMixConfig:
        """A pattern with the layers that use it."""
        return cls(
            pattern.num_sink_tokens,
            pattern.sliding_window_size,
            pattern.num_last_tokens,
            triangle_layer_indices=triangle_layer_indices,
        )

    # Other people's spellings; the conversions themselves live in `TrianglePattern`.

    @classmethod
    def from_minference(
        cls, n_init: int, n_local: int, last_n: int, starting_layer: int
    ) -> TriangleMixConfig:
        """MInference's `attn_kwargs` of `attn_type="tri_mix"`: the same meaning, other names."""
        pattern = TrianglePattern.from_minference(n_init, n_local, last_n)
        return replace(cls.from_pattern(pattern), starting_layer=starting_layer)

    @classmethod
    def from_paper(cls, si: int, sl: int, last: int, starting_layer: int) -> TriangleMixConfig:
        """The paper's 1-based formulas: its window `sl` leaves the row itself out of its count."""
        pattern = TrianglePattern.from_paper(si, sl, last)
        return replace(cls.from_pattern(pattern), starting_layer=starting_layer)

    @classmethod
    def from_reference_card(
        cls, si: int, sl: int, last: int, triangle_layer_indices: Sequence[int] | None = None
    ) -> TriangleMixConfig:
        """The reference card's 0-based formulas: one more sink, one more key, one row less."""
        pattern = TrianglePattern.from_reference_card(si, sl, last)
        return cls.from_pattern(pattern, triangle_layer_indices)

    @classmethod
    def from_vllm_ascend(
        cls, sink: int, window: int, tail: int, triangle_layer_indices: Sequence[int] | None = None
    ) -> TriangleMixConfig:
        """vllm-ascend's fused operator: its window leaves the row itself out of its count."""
        pattern = TrianglePattern.from_vllm_ascend(sink, window, tail)
        return cls.from_pattern(pattern, triangle_layer_indices)


def _sorted_indices(name: str, layers: Sequence[int]) -> tuple[int, ...]:
    for layer in layers:
        check_count(f"a layer of {name}", layer, 0)
    indices = tuple(sorted(int(layer) for layer in layers))
    if len(set(indices)) != len(indices):
        raise ConfigurationError(f"{name} names a layer twice: {list(indices)}; name each once")
    return indices
