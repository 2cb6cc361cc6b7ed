"""Pictures of an analysis: gradients by layer, a mask, accuracy by number of triangle layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, Final

import numpy as np
from trianglemix.analysis.errors import AnalysisError
from trianglemix.analysis.sections import SECTIONS
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.custom_ops.triangle.pattern import keep_mask

COLORS: Final = {"streaming": "#4878a8", "middle": "#d1603d", "last": "#6a9f58"}
_GRID: Final = "#dddddd"
_DPI: Final = 130


def require_matplotlib() -> None:
    """Raises AnalysisError when the pictures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise AnalysisError(
            f"matplotlib, which draws the pictures, cannot be imported ({error}); "
            "pip install 'trianglemix[analysis]', or give --no-plots"
        ) from error


def gradient_bars(gradients: Mapping[str, Any], chosen: Sequence[int]) -> bytes:
    """PNG: mean absolute gradient by layer and section, log scale; chosen layers are shaded."""
    layers = len(gradients["middle"]["mean_abs"])
    figure, axes = new_figure(max(7.0, 0.36 * layers), 3.9)
    for layer in chosen:
        axes.axvspan(layer - 0.5, layer + 0.5, color="#f3ead9", zorder=0)
    for n, section in enumerate(SECTIONS):
        places = np.arange(layers) + 0.27 * (n - 1)
        values = gradients[section]["mean_abs"]
        axes.bar(places, values, 0.27, label=section.capitalize(), color=COLORS[section], zorder=2)
    axes.set_yscale("log")
    axes.set_xlim(-0.6, layers - 0.4)
    axes.set_xticks(range(0, layers, 1 if layers <= 40 else 4))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("layer (shaded: triangle layers)")
    axes.set_ylabel("mean |d logit / d weight|")
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return png_of(figure)


def mask_picture(pattern: TrianglePattern, length: int) -> bytes:
    """PNG: which keys a triangle layer keeps of a prompt of `length` tokens, by section."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    triangle = keep_mask(length, pattern)
    far = TrianglePattern(pattern.num_sink_tokens, pattern.sliding_window_size, 1)
    streaming = keep_mask(length + 1, far)[:length, :length]
    causal = np.tril(np.ones((length, length), bool))
    kinds = np.zeros((length, length), np.uint8)
    for number, part in enumerate((streaming, causal & ~triangle, triangle & ~streaming), 1):
        kinds[part] = number
    middle = "#f0cfc2"
    colors = ["#ffffff", COLORS["streaming"], middle, COLORS["last"]]
    figure, axes = new_figure(5.2, 4.6)
    axes.imshow(kinds, cmap=ListedColormap(colors), vmin=0, vmax=3, interpolation="nearest")
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)  # it would hide the sinks
    names = ("Streaming: kept", "Middle: dropped", "Last: kept")
    patches = [Patch(color=c, label=n) for c, n in zip(colors[1:], names, strict=True)]
    axes.legend(handles=patches, frameon=False, loc="upper right")
    return png_of(figure)


def accuracy_curve(check: Mapping[str, Any]) -> bytes:
    """PNG: percent right against the number of triangle layers, with 95% intervals."""
    figure, axes = new_figure(6.2, 3.6)
    dense = check["dense"]
    axes.axhspan(100 * dense["low"], 100 * dense["high"], color="#eeeeee", zorder=0)
    axes.axhline(100 * dense["mean"], color="#777777", lw=1, ls="--", label="dense")
    groups = (
        ("least important layers", check["trials"], COLORS["streaming"], "o"),
        ("most important layers (control)", [check["control"]], COLORS["middle"], "s"),
    )
    for name, trials, color, marker in groups:
        ordered = sorted(trials, key=lambda t: len(t["layers"]))
        counts = [len(t["layers"]) for t in ordered]
        scores = np.array([[100 * t["score"][k] for t in ordered] for k in ("mean", "low", "high")])
        spread = np.abs(scores[1:] - scores[0])
        style = dict(color=color, marker=marker, capsize=3, lw=1.4, label=name)
        axes.errorbar(counts, scores[0], yerr=spread, **style)
    axes.set_ylim(0, 103)
    axes.set_xlim(left=0)
    axes.set_xlabel("triangle layers")
    axes.set_ylabel("right answers, %")
    axes.legend(frameon=False, loc="lower left")
    return png_of(figure)


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches with one pair of axes, in the style of all pictures."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_GRID, lw=0.6)
    return figure, axes


def png_of(figure: Any) -> bytes:
    """The figure as PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()
