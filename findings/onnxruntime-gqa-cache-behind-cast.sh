#!/usr/bin/env bash
# Two GroupQueryAttention nodes whose caches pass through a Cast (a float16 cache around float32
# attention) do not run in ONNX Runtime 1.27 to 1.31: a call ends in "Shape mismatch attempting to
# re-use buffer". The shape inference of the node gives its present the length of its past, and the
# memory planner then puts the second node's present into the first one's past. 1.24.4 and 1.32.0
# run the same file, and so does every version with enable_mem_reuse off.
#
# Seen 2026-11-27, CPU provider, onnx 1.23.2, numpy 2.4.6:
#   1.24.4 reuse on: runs          reuse off: runs
#   1.27.0 reuse on: re-use buffer reuse off: runs
#   1.31.1 reuse on: re-use buffer reuse off: runs
#   1.32.0 reuse on: runs          reuse off: runs
# Consequence: an exporter that lowers to GroupQueryAttention must hand past and present to the
# graph's own inputs and outputs, or keep another operator there.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
cat > "$place/run.py" <<'PY'
import numpy as np, onnxruntime as ort
from onnx import TensorProto, helper

def info(name, kind, *shape):
    return helper.make_tensor_value_info(name, kind, shape)

nodes, rows = [], "rows"
inputs = [info("rows", TensorProto.FLOAT, "batch", "tokens", 32),
          info("seqlens", TensorProto.INT32, "batch"), info("total", TensorProto.INT32, 1)]
outputs = [info("result", TensorProto.FLOAT, "batch", "tokens", 32)]
for layer in range(2):
    cache = [f"{kind}.{layer}" for kind in ("key", "value")]
    for name in cache:
        inputs.append(info(f"past.{name}", TensorProto.FLOAT16, "batch", 2, "past_length", 16))
        outputs.append(info(f"present.{name}", TensorProto.FLOAT16, "batch", 2, "all_length", 16))
        nodes.append(helper.make_node("Cast", [f"past.{name}"], [f"wide.{name}"], to=1))
    made = [f"attended.{layer}", *(f"new.{name}" for name in cache)]
    nodes.append(helper.make_node(
        "GroupQueryAttention", [rows] * 3 + [f"wide.{name}" for name in cache] + ["seqlens", "total"],
        made, domain="com.microsoft", num_heads=2, kv_num_heads=2))
    nodes += [helper.make_node("Cast", [f"new.{name}"], [f"present.{name}"], to=10)
              for name in cache]
    rows = made[0]
nodes.append(helper.make_node("Identity", [rows], ["result"]))
model = helper.make_model(
    helper.make_graph(nodes, "two_layers", inputs, outputs), ir_version=8,
    opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)])
past, new = 5, 1
feeds = {"rows": np.ones((1, new, 32), np.float32), "total": np.array([past + new], np.int32),
         "seqlens": np.array([past + new - 1], np.int32)}
feeds |= {x.name: np.ones((1, 2, past, 16), np.float16) for x in inputs if x.name.startswith("past")}
for reuse in (True, False):
    options = ort.SessionOptions()
    options.enable_mem_reuse, options.log_severity_level = reuse, 4
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    try:
        session.run(None, feeds)
        seen = "runs"
    except Exception as error:
        seen = "re-use buffer" if "re-use buffer" in str(error) else str(error)[:200]
    print(ort.__version__, "reuse on:" if reuse else "reuse off:", seen)
PY
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q numpy==2.4.6 onnx==1.23.2
for version in 1.24.4 1.27.0 1.31.1 1.32.0; do
  "$place/env/bin/pip" install -q "onnxruntime==$version"
  "$place/env/bin/python" "$place/run.py"
done | tee "$place/seen"
diff "$place/seen" - <<'SEEN'
1.24.4 reuse on: runs
1.24.4 reuse off: runs
1.27.0 reuse on: re-use buffer
1.27.0 reuse off: runs
1.31.1 reuse on: re-use buffer
1.31.1 reuse off: runs
1.32.0 reuse on: runs
1.32.0 reuse off: runs
SEEN
echo "as it was"
