"""The analysis as a plan file: model, settings, figures, choice and check."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Final

from trianglemix.analysis.check import Check
from trianglemix.analysis.sections import SECTIONS
from trianglemix.analysis.select import Importance
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.exporter.layers.plan import Fingerprint, Plan

_DIGITS: Final = 6


def build_plan(
    name: str,
    fingerprint: Fingerprint,
    pattern: TrianglePattern,
    ranked: tuple[int, ...],
    chosen: tuple[int, ...],
) -> Plan:
    """The plan without its figures: `ranked` is least important first, `chosen` any order."""
    return Plan(
        name=name,
        fingerprint=fingerprint,
        pattern=pattern,
        layers_by_importance=ranked,
        triangle_layers=tuple(sorted(chosen)),
    )


def figures_of(
    importance: Importance, settings: dict[str, Any], rule: str, check: Check | None
) -> dict[str, Any]:
    """What is worth keeping of a measured plan, as JSON."""
    gradients = {
        section: {
            "mean": _rounded(importance.mean[:, s].tolist()),
            "mean_abs": _rounded(importance.mean_abs[:, s].tolist()),
        }
        for s, section in enumerate(SECTIONS)
    }
    return {
        "measured": True,
        "probe": settings,
        "rule": rule,
        "rank_correlation_of_halves": importance.half_correlation,
        "gradients_by_layer": gradients,
        "check": asdict(check) if check else None,
    }


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values]
