#!/bin/sh
# Builds the operator package on a machine with CANN's toolkit: sh build.sh [SOC] [FOLDER]
# SOC: Ascend910B3 (default) or another 910B or 910_93 chip. FOLDER: where to work, made anew.
# Exit codes: 0 built, 77 CANN is not here, 1 anything else. Never compiled by CANN until someone
# has run this.
set -eu

HERE="$(cd "$(dirname "$0")" && pwd)"
SOC="${1:-Ascend910B3}"
FOLDER="${2:-$PWD/trianglemix_opp}"
CANN="${ASCEND_HOME_PATH:-${ASCEND_TOOLKIT_HOME:-}}"

say() { echo "build.sh: $*" >&2; }

[ -n "$CANN" ] && [ -d "$CANN" ] || {
  say "CANN's toolkit is missing: install it and source its set_env.sh (sets ASCEND_HOME_PATH);" \
    "these sources were never compiled by CANN"
  exit 77
}
MSOPGEN="$(command -v msopgen || echo "$CANN/python/site-packages/bin/msopgen")"
[ -x "$MSOPGEN" ] || {
  say "msopgen is missing from $CANN: install the full toolkit, not only the runtime;" \
    "these sources were never compiled by CANN"
  exit 77
}
case "$SOC" in
Ascend910B* | Ascend910_93*) ;;
*)
  say "$SOC is not a 910B or 910_93 chip, which these sources are written for"
  exit 1
  ;;
esac
[ ! -e "$FOLDER" ] || {
  say "$FOLDER exists: remove it, or name another folder"
  exit 1
}

say "never compiled by CANN before: please report what comes out"
"$MSOPGEN" gen -i "$HERE/triangle_attention.json" -f onnx -c "ai_core-$SOC" -lan cpp -out "$FOLDER"

# The project that msopgen makes, with our sources instead of its templates.
rm -f "$FOLDER"/op_host/*.cpp "$FOLDER"/op_host/*.h "$FOLDER"/op_kernel/*.cpp
cp "$HERE"/op_host/*.cpp "$HERE"/op_host/*.h "$FOLDER/op_host/"
cp "$HERE"/op_kernel/*.cpp "$HERE"/op_kernel/*.h "$HERE"/../../src/tiles.h "$FOLDER/op_kernel/"
mkdir -p "$FOLDER/framework/onnx_plugin"
rm -f "$FOLDER"/framework/onnx_plugin/*.cc
cp "$HERE"/framework/onnx_plugin/*.cc "$HERE"/framework/onnx_plugin/*.h \
  "$FOLDER/framework/onnx_plugin/"
sed -i 's/"value": "customize"/"value": "trianglemix"/' "$FOLDER/CMakePresets.json"

(cd "$FOLDER" && sh build.sh) || {
  say "CANN's build failed in $FOLDER; its output is above"
  exit 1
}
PACKAGE="$(find "$FOLDER/build_out" -name 'custom_opp_*.run' | head -n 1)"
[ -n "$PACKAGE" ] || {
  say "CANN's build left no custom_opp_*.run in $FOLDER/build_out"
  exit 1
}
echo "built $PACKAGE"
echo "install: sh $PACKAGE --install-path=PATH, then source PATH/vendors/trianglemix/bin/set_env.bash"
