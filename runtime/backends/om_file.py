"""Where a folder's offline models lie, which atc makes of its graphs."""

from __future__ import annotations

from pathlib import Path

from trianglemix.manifest.static_graphs import StaticGraph
from trianglemix.runtime.errors import FolderError
from trianglemix.runtime.model_folder import ModelFolder


def om_file(graph: StaticGraph) -> str:
    """Name of the offline model that atc makes of a graph."""
    return str(Path(graph.file).with_suffix(".om"))


def find_om(folder: ModelFolder, graph: StaticGraph) -> Path:
    """Path of a graph's offline model.

    Raises:
        FolderError: atc has not made it yet.
    """
    path = folder.path / om_file(graph)
    if not path.is_file():
        raise FolderError(
            f"{path} is missing; run build_om.sh in that folder on a machine with CANN's "
            "toolkit (an NPU is not needed for it)"
        )
    return path
