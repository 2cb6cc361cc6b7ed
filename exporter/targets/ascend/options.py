"""What the user may ask of the target ascend, and what it adds to the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import click
from trianglemix.exporter.options import ExportOptions
from trianglemix.manifest.static_graphs import Lowering

TARGET_NAME: Final = "ascend"
_NAMES: Final = {"soc": "--soc", "chunk": "--chunk", "max_length": "--max-length",
                 "block": "--block", "lowering": "--lowering"}  # fmt: skip


@dataclass(frozen=True)
class AscendRequest:
    """Options of the target; tokens. `max_length` and `block` None leave it to us.

    `cost` prints the cost model's tables.
    """

    soc: str = "Ascend910B3"
    chunk: int = 1024
    max_length: int | None = None
    block: int | None = None
    lowering: Lowering = "block"
    cost: bool = False

    @classmethod
    def of(cls, options: ExportOptions) -> AscendRequest:
        """An export's own; the defaults where it was asked for nothing."""
        return options.settings if isinstance(options.settings, cls) else cls()


OPTIONS: Final = (
    click.option("--soc", help="Ascend: the chip, as atc names it.  [default: Ascend910B3]"),
    click.option(
        "--chunk", type=click.IntRange(1), help="Ascend: prompt rows per call.  [default: 1024]"
    ),
    click.option(
        "--max-length",
        type=click.IntRange(1),
        help="Ascend: tokens of the cache.  [default: the context, at most 8192]",
    ),
    click.option(
        "--block", type=click.IntRange(1), help="Ascend: rows of a block; else by the cost model."
    ),
    click.option(
        "--lowering",
        type=click.Choice(["block", "custom"]),
        help="Ascend: attention in standard operators, or as the custom operator of "
        "custom_ops/ascend (never compiled by CANN).  [default: block]",
    ),
    click.option("--cost", is_flag=True, help="Ascend: print the cost model's tables."),
    click.option(
        "--lint",
        type=click.Choice([TARGET_NAME]),
        help="Only check SOURCE, an ONNX file, against what atc reads.",
    ),
)


def read_request(given: Mapping[str, Any]) -> AscendRequest | None:
    """The options of the target ascend; None for another target.

    Raises:
        click.UsageError: an option of this target with another one.
    """
    chosen = {name: given[name] for name in _NAMES if given[name] is not None}
    if TARGET_NAME in (given["target"], given["lint"]):
        _check_custom(given)
        return AscendRequest(**chosen, cost=given["cost"])
    if chosen or given["cost"]:
        option = next((_NAMES[name] for name in chosen), "--cost")
        raise click.UsageError(f"{option} belongs to --target {TARGET_NAME}")
    return None


def _check_custom(given: Mapping[str, Any]) -> None:
    if given["lowering"] != "custom":
        return
    for name, option in (("block", "--block"), ("cost", "--cost")):
        if given[name]:
            raise click.UsageError(
                f"{option} is about the block form, but --lowering custom keeps the operator; "
                f"leave {option} out"
            )
