"""The shell script that turns an exported folder's graphs into offline models with atc."""

from __future__ import annotations

from trianglemix.manifest.static_graphs import StaticGraph, StaticGraphs

FILE_NAME = "build_om.sh"

_HEAD = """#!/bin/sh
# Builds the offline models of this folder with CANN's atc: sh build_om.sh [soc_version]
# Written by trianglemix-export. These command lines have not been run by its authors, who had no
# CANN; the graphs were checked by a linter of atc's rules and run on ONNX Runtime.
# An NPU is not needed here, CANN's toolkit is: source its set_env.sh first.
set -u
cd "$(dirname "$0")" || exit 1
SOC="${1:-@SOC@}"
command -v atc >/dev/null 2>&1 || {
  echo "build_om.sh: atc is not on the PATH; install CANN's toolkit (hiascend.com) and source" \\
    "its set_env.sh" >&2
  exit 1
}

# Runs atc and believes neither its exit code nor its last word alone.
run_atc() {
  log="$1"
  word="$2"
  shift 2
  atc "$@" >"$log" 2>&1
  code=$?
  if [ "$code" -ne 0 ] || ! grep -q "$word" "$log"; then
    tail -n 20 "$log" >&2
    echo "build_om.sh: atc failed (exit code $code); the whole log is in $log" >&2
    exit 1
  fi
}

build() {
  model="$1"
  shapes="$2"
  echo "precheck $model.onnx"
  run_atc "$model.precheck.log" "@SUCCESS@" --mode=3 --framework=5 --model="$model.onnx" \\
    --soc_version="$SOC" --check_report="$model.check_report.json" --log=error
  echo "convert $model.onnx"
  run_atc "$model.atc.log" "@SUCCESS@" --framework=5 --model="$model.onnx" --output="$model" \\
    --soc_version="$SOC" --input_shape="$shapes" --input_format=ND \\
    --precision_mode_v2=origin --log=error
  [ -s "$model.om" ] || {
    echo "build_om.sh: atc reported success, but there is no $model.om" >&2
    exit 1
  }
}
"""
_SUCCESS = "ATC run success"
_CUSTOM = """
# These graphs hold trianglemix::1::TriangleAttention, an operator that CANN has not. Install its
# package first (custom_ops/ascend of trianglemix). It was never compiled by CANN.
find_plugin() {
  named="$(echo "${ASCEND_CUSTOM_OPP_PATH:-}" | tr ':' ' ')"
  for place in $named "${ASCEND_OPP_PATH:-}"/vendors/*; do
    for plugin in "$place"/framework/onnx/*.so; do
      [ -f "$plugin" ] && echo "$plugin"
    done
  done
}
PLUGINS="$(find_plugin)"
[ -n "$PLUGINS" ] || {
  echo "build_om.sh: no operator package with an ONNX plugin is installed, and these graphs need" \\
    "the one of trianglemix: build and install custom_ops/ascend, set ASCEND_CUSTOM_OPP_PATH as" \\
    "its installer says, or export with --lowering block" >&2
  exit 1
}
echo "operator packages: $PLUGINS"
"""


def build_script(static: StaticGraphs) -> str:
    """The script's text: a precheck and a conversion of each graph, static shapes spelled out.

    Where the graphs hold the custom operator, it first looks for the operator's package.
    """
    head = _HEAD.replace("@SOC@", static.soc).replace("@SUCCESS@", _SUCCESS)
    if static.lowering == "custom":
        head += _CUSTOM
    stems = [(graph.file.removesuffix(".onnx"), input_shape(graph)) for graph in static.graphs]
    calls = [f"build {stem} '{shapes}'" for stem, shapes in stems]
    return "\n".join([head, *calls, 'echo "done: run with trianglemix-run . --provider npu"', ""])


def input_shape(graph: StaticGraph) -> str:
    """`name:1,2;name:3`, as --input_shape takes it."""
    return ";".join(f"{x.name}:{','.join(map(str, x.shape))}" for x in graph.inputs)
