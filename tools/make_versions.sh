#!/bin/sh
# Makes build/envs/ort-VERSION for each version named (else for all that tests/versions knows):
# a folder with that ONNX Runtime alone, which goes before the project's own on PYTHONPATH.
set -eu
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || { echo "make_versions.sh: no .venv; run make setup" >&2; exit 1; }
[ $# -gt 0 ] || set -- 1.22.1 1.24.4 1.27.0 1.31.1 1.32.0
for version in "$@"; do
  target=build/envs/ort-$version
  [ -e "$target/complete" ] && continue
  rm -rf "$target"
  .venv/bin/python -m pip install -q --no-deps --target "$target" "onnxruntime==$version"
  touch "$target/complete"
done
