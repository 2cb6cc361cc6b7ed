"""Pictures of a block-sparse analysis: density and recall by layer, density against length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from trianglemix.analysis.plots import COLORS, new_figure, png_of

_KEPT: Final = COLORS["streaming"]
_RECALL: Final = COLORS["middle"]
_WORST: Final = COLORS["last"]


def layer_shares(by_layer: Mapping[str, Any], mass: str, chosen: Sequence[int]) -> bytes:
    """PNG: density and recall of each layer at one mass; the chosen layers are shaded.

    `by_layer` are the figures of one prompt length, as in `block_shares.as_json`.
    """
    layers = list(by_layer)
    names = by_layer[layers[0]][mass]
    figures = {name: [by_layer[x][mass][name] for x in layers] for name in names}
    figure, axes = new_figure(max(6.8, 0.5 * len(layers)), 4.1)
    places = np.arange(len(layers))
    for place, layer in enumerate(layers):
        if int(layer) in chosen:
            axes.axvspan(place - 0.5, place + 0.5, color="#f3ead9", zorder=0)
    axes.bar(places, figures["density"], 0.6, color=_KEPT, label="kept blocks", zorder=2)
    style = dict(linestyle="none", zorder=3)
    axes.plot(places, figures["exact"], "k_", ms=14, label="by every row's attention", **style)
    axes.plot(places, figures["recall"], "o", color=_RECALL, label="recall, mean", **style)
    axes.plot(places, figures["low"], "v", color=_RECALL, label="5th percentile", **style)
    axes.plot(places, figures["worst"], "s", ms=4, color=_WORST, label="worst head", **style)
    axes.set_xticks(places, layers)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("layer (shaded: block-sparse layers)")
    axes.set_ylabel("share")
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), fontsize=9)
    return png_of(figure)


def density_by_length(lengths: Mapping[str, Any], chosen: Sequence[int]) -> bytes:
    """PNG: mean density of the chosen layers against prompt length, a line for each mass."""
    figure, axes = new_figure(6.2, 3.6)
    tokens = [int(length) for length in lengths]
    masses = list(next(iter(next(iter(lengths.values())).values())))
    shades = np.linspace(0.35, 1, len(masses))
    for mass, shade in zip(masses, shades, strict=True):
        for name, line in (("density", "-o"), ("exact", "--")):
            values = [
                np.mean([by_layer[str(x)][mass][name] for x in chosen])
                for by_layer in lengths.values()
            ]
            label = f"mass {mass}" if name == "density" else None
            axes.plot(tokens, values, line, color=_KEPT, alpha=shade, lw=1.4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [f"{n:,}" for n in tokens])
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("tokens (dashed: blocks chosen by every row's attention)")
    axes.set_ylabel("kept share of causal blocks")
    axes.legend(frameon=False)
    return png_of(figure)
