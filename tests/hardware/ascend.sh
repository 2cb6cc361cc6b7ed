#!/bin/sh
# On a machine with an Ascend NPU and CANN: exports a model twice (triangle layers, and its dense
# twin), converts both with atc, compares the NPU's answers with ONNX Runtime's on the same graphs,
# and times dense against triangle.
#
#   sh tests/hardware/ascend.sh [model.onnx or Hugging Face folder] [soc_version] [block|custom]
#
# Without arguments: SmolLM2, Ascend910B3, block. With custom a float16 or bfloat16 model, or a
# Hugging Face folder (converted), and the operator package of custom_ops/ascend/opp installed.
# Exit codes: 0 done, 1 failed, 77 skipped (no CANN).
# Nobody has run this yet: its authors had no NPU. Results go to build/hardware/, or its folder custom.
set -u
cd "$(dirname "$0")/../.." || exit 1
SOC="${2:-Ascend910B3}"
LOWERING="${3:-block}"
OUT=build/hardware
PYTHON="${PYTHON:-.venv/bin/python}"

skip() {
  echo "SKIPPED tests/hardware/ascend.sh: $1" >&2
  exit 77
}
command -v atc >/dev/null 2>&1 || skip "no atc on the PATH; install CANN's toolkit and source its set_env.sh"
[ -x "$PYTHON" ] || skip "no $PYTHON; run make setup, or set PYTHON"
"$PYTHON" -c 'import acl' 2>/dev/null || "$PYTHON" -c 'import ais_bench.infer.interface' 2>/dev/null ||
  skip "$PYTHON has neither pyACL (source CANN's set_env.sh) nor the wheels aclruntime and ais_bench"
command -v npu-smi >/dev/null 2>&1 || skip "no npu-smi: this machine has no NPU driver"

set -e
if [ "$LOWERING" = custom ]; then
  MODEL="${1:-$("$PYTHON" -c 'from source_models.smollm2 import hugging_face_folder as f; print(f())')}"
  OUT="$OUT/custom"
else
  MODEL="${1:-$("$PYTHON" -c 'from source_models.smollm2 import plain_onnx; print(plain_onnx())')}"
fi
set -- --target ascend --soc "$SOC" --max-length 8192 --lowering "$LOWERING" --force
if [ "$LOWERING" = custom ] && [ -d "$MODEL" ]; then
  set -- "$@" --dtype float16
fi
mkdir -p "$OUT"
npu-smi info >"$OUT/npu-smi.txt"
EXPORT="$(dirname "$PYTHON")/trianglemix-export"
"$EXPORT" "$MODEL" -o "$OUT/triangle" "$@"
"$EXPORT" "$MODEL" -o "$OUT/dense" --dense "$@"
sh "$OUT/triangle/build_om.sh" "$SOC"
sh "$OUT/dense/build_om.sh" "$SOC"
"$PYTHON" tests/hardware/ascend_compare.py "$OUT/triangle" "$OUT/dense" "$OUT/result.json"
