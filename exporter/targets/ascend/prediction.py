"""The cost model's answer for one model: block sizes on its chip, and every chip beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rich.console import Console
from rich.table import Table
from trianglemix.exporter.targets.ascend.cost_model import (
    BLOCK_SIZES,
    CostModel,
    choose_block,
    tile_fit,
)
from trianglemix.exporter.targets.ascend.soc import SOCS, Soc

TILES: Final = ((64, 128), (128, 128))


@dataclass(frozen=True)
class BlockPrediction:
    """One block size. Flops and bytes of one triangle layer (a dense one where there is none)."""

    block: int
    layer_flops: float
    kept_share: float
    layer_bytes: float
    attention_ms: float
    attention_share: float
    prefill_share: float


@dataclass(frozen=True)
class ChipPrediction:
    """The best block size of one chip, and which fused tiles (rows x keys) its buffers hold."""

    soc: str
    block: int
    prefill_ms: float
    prefill_share: float
    tile_ub_kib: dict[str, int]
    tile_fits: dict[str, bool]


@dataclass(frozen=True)
class AscendPrediction:
    """Shares are of the same model with every layer dense, in static graphs like these."""

    soc: str
    prompt_length: int
    chunk: int
    slots: int
    block: int
    blocks: tuple[BlockPrediction, ...]
    chips: tuple[ChipPrediction, ...]


def predict(model: CostModel, length: int, soc: Soc, block: int) -> AscendPrediction:
    """Figures for a prompt of `length` tokens, at most the cache's slots; `block` is in use."""
    length = min(length, model.slots)
    sizes = sorted({block, *(size for size in BLOCK_SIZES if model.chunk % size == 0)})
    return AscendPrediction(
        soc=soc.name,
        prompt_length=length,
        chunk=model.chunk,
        slots=model.slots,
        block=block,
        blocks=tuple(_block(model, length, soc, size) for size in sizes),
        chips=tuple(_chip(model, length, chip) for chip in SOCS),
    )


def _block(model: CostModel, length: int, soc: Soc, block: int) -> BlockPrediction:
    cost = model.prompt(length, block, soc)
    work = cost.banded or cost.dense
    return BlockPrediction(
        block,
        work.flops,
        work.kept_flops / work.flops,
        work.bytes,
        1e3 * cost.attention_seconds,
        cost.attention_share,
        cost.prefill_share,
    )


def _chip(model: CostModel, length: int, soc: Soc) -> ChipPrediction:
    block = choose_block(model, length, soc)
    cost = model.prompt(length, block, soc)
    banded = (layer for layer in model.layers if not layer.pattern.is_dense)
    attention = next(banded, model.layers[0])
    fits = {
        f"{rows}x{keys}": tile_fit(attention, (rows, keys), model.itemsize, soc)
        for rows, keys in TILES
    }
    return ChipPrediction(
        soc.name,
        block,
        1e3 * (cost.attention_seconds + cost.other_seconds),
        cost.prefill_share,
        {name: fit.ub_bytes >> 10 for name, fit in fits.items()},
        {name: fit.fits for name, fit in fits.items()},
    )


def print_prediction(prediction: AscendPrediction, console: Console) -> None:
    """Two tables and what they leave out."""
    console.print(_block_table(prediction))
    console.print(_chip_table(prediction))
    console.print(
        "predicted from the chips' derived peak rates, nothing was measured; the compiler's "
        "fusion, L2 and launch overheads are left out",
        highlight=False,
    )


def _block_table(prediction: AscendPrediction) -> Table:
    title = f"{prediction.soc}, {prediction.prompt_length} tokens, chunk {prediction.chunk}"
    table = Table(title=title, title_justify="left")
    names = ("block", "GFLOP/layer", "kept", "GB/layer", "attention ms", "of prefill", "of dense")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in prediction.blocks:
        table.add_row(
            f"{row.block}{' *' if row.block == prediction.block else ''}",
            f"{row.layer_flops / 1e9:.1f}",
            f"{100 * row.kept_share:.0f} %",
            f"{row.layer_bytes / 1e9:.2f}",
            f"{row.attention_ms:.1f}",
            f"{100 * row.attention_share:.0f} %",
            f"{100 * row.prefill_share:.0f} %",
        )
    return table


def _chip_table(prediction: AscendPrediction) -> Table:
    table = Table(
        title="every chip, and whether its UB holds a tile of a fused kernel", title_justify="left"
    )
    tiles = [f"{rows}x{keys}" for rows, keys in TILES]
    for name in ("chip", "block", "prefill ms", "of dense", *tiles):
        table.add_column(name, justify="left" if name == "chip" else "right", no_wrap=True)
    for row in prediction.chips:
        table.add_row(
            row.soc,
            str(row.block),
            f"{row.prefill_ms:.0f}",
            f"{100 * row.prefill_share:.0f} %",
            *(
                f"{row.tile_ub_kib[tile]}K {'yes' if row.tile_fits[tile] else 'no'}"
                for tile in tiles
            ),
        )
    return table
