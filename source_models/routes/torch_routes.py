"""torch's own exporters: dynamo and TorchScript, sdpa and eager, several opsets."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Final, cast

from source_models.plain_onnx import Attention, PlainExport, Route, export_plain
from source_models.routes.worker import work

_NAME: Final = re.compile(r"(dynamo|torchscript)-(sdpa|eager)-(\d+)")


def make(route: str, folder: Path, target: Path) -> None:
    """Routes are called `dynamo-sdpa-20`, `torchscript-eager-18` and so on."""
    parts = _NAME.fullmatch(route)
    assert parts, f"{route} is not a route of torch's exporters"
    exporter, attention = cast(Route, parts[1]), cast(Attention, parts[2])
    export = PlainExport(exporter, attention, int(parts[3]))
    with tempfile.TemporaryDirectory() as place:
        export_plain(_exportable(folder, Path(place)), target / "model.onnx", export)


def _exportable(folder: Path, place: Path) -> Path:
    """The folder; a mixture of experts asks for the one implementation that can be traced."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "num_experts_per_tok" not in config:
        return folder
    config["experts_implementation"] = "batched_mm"
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (place / "model.safetensors").symlink_to((folder / "model.safetensors").resolve())
    return place


if __name__ == "__main__":
    sys.exit(work(make))
