"""What an export saves, predicted by counting kept pairs of rows and keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.custom_ops.triangle.pattern import kept_pairs
from trianglemix.exporter.attention.attention_probe import pattern_of
from trianglemix.exporter.attention.sites import AttentionSite
from trianglemix.exporter.graph.attention_node import LayerRole
from trianglemix.exporter.interface.language_model_head import LanguageModelHead
from trianglemix.exporter.layers.choice import LayerChoice


@dataclass(frozen=True)
class AttentionCost:
    """Attention of all layers over one prompt of `prompt_length` tokens, batch 1.

    Flops count a multiply and an add as two, over kept pairs of rows and keys only; a block-sparse
    layer's are those of its sampled scores and of the blocks that the plan says it keeps.
    `triangle_flops` are the export's. `not_predicted` are block-sparse layers of which nobody
    measured what they keep: they count as dense.
    """

    prompt_length: int
    dense_flops: int
    triangle_flops: int
    not_predicted: tuple[int, ...] = ()

    @property
    def share(self) -> float:
        """Flops left, as a share of the source's."""
        return self.triangle_flops / self.dense_flops if self.dense_flops else 1.0


def attention_cost(
    sites: Sequence[AttentionSite], choice: LayerChoice, prompt_length: int
) -> AttentionCost:
    """The source's attention beside the export's."""
    before, after, unknown = 0, 0, []
    for site in sites:
        whole = _flops(site, pattern_of(site.mask), prompt_length)
        before += whole
        match choice.role(site):
            case LayerRole.TRIANGLE:
                after += _flops(site, choice.pattern, prompt_length)
            case LayerRole.BLOCK_SPARSE:
                share = choice.blocks.share(site.layer, prompt_length)
                after += round(whole * (1.0 if share is None else share))
                unknown += [site.layer] if share is None else []
            case _:
                after += whole
    return AttentionCost(prompt_length, before, after, tuple(unknown))


def _flops(site: AttentionSite, pattern: TrianglePattern, prompt_length: int) -> int:
    """`2 * pairs * H * (D + Dv)`: scores and weighted values."""
    pairs = kept_pairs(prompt_length, pattern)
    sizes = site.shape.head_size + site.shape.value_head_size
    return 2 * pairs * site.shape.num_heads * sizes


@dataclass(frozen=True)
class LastTokenSaving:
    """What one row of logits instead of `prompt_length` saves in a prefill of one sequence."""

    logits_bytes: int
    head_flops: int
    tail_flops: int = 0  # products behind the last attention that see one row as well


def last_token_saving(
    head: LanguageModelHead | None, tail_sizes: int, prompt_length: int, bytes_per_logit: int
) -> LastTokenSaving | None:
    """None where the sizes of the LM head are not in the file.

    `tail_sizes` is the size of the weights behind the last attention that see one row too.
    """
    if head is None or head.hidden_size is None or head.vocabulary_size is None:
        return None
    rows = prompt_length - 1
    return LastTokenSaving(
        logits_bytes=rows * head.vocabulary_size * bytes_per_logit,
        head_flops=2 * rows * head.vocabulary_size * head.hidden_size,
        tail_flops=2 * rows * tail_sizes,
    )
