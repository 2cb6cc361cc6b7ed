"""Exports cases with the ONNX Runtime that it finds, which the probe then measures with.

python -m tests.versions.export_there SOURCES OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnxruntime as ort
from trianglemix.exporter.errors import ExportError

from tests.versions.cases import export_case


def main() -> None:
    """The last line printed is JSON: the version, and a reason per source that is refused."""
    sources, output = map(Path, sys.argv[1:])
    refused = {}
    for source in sorted(sources.iterdir()):
        try:
            export_case(source.name, source / "model.onnx", output)
        except ExportError as error:
            refused[source.name] = str(error)
    print(json.dumps({"version": ort.__version__, "refused": refused}))


if __name__ == "__main__":
    main()
