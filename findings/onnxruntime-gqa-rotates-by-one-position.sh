#!/usr/bin/env bash
# GroupQueryAttention with do_rotary=1 and position_ids [batch, tokens]: a prompt without a past is
# rotated from position_ids[0, 0] on, in every row of the batch, whatever else stands there; a call
# with a past reads every entry. A left-padded batch, or positions that do not count up by one, is
# therefore rotated otherwise in its prompt than in its decode steps. 1.22 to 1.32 alike.
#
# Seen 2026-11-27, CPU provider, onnx 1.23.2, numpy 2.4.6: see the end of this file; each list holds
# the positions at which the rows were rotated.
# Consequence: an exporter cannot take the input for positions, and refuses it; the rotation belongs
# before the node.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
cat > "$place/run.py" <<'PY'
import numpy as np, onnxruntime as ort
from onnx import TensorProto, helper

HALF, STEP = 8, 0.1

def info(name, kind, *shape):
    return helper.make_tensor_value_info(name, kind, shape)

def rotated_at(past, positions):
    """Keys of one angle: the angle that the present holds tells where it was rotated."""
    batch, new = positions.shape
    node = helper.make_node(
        "GroupQueryAttention", ["rows", "rows", "rows", "past_key", "past_value", "ends", "total",
                                "cosines", "sines", "positions"],
        ["result", "present_key", "present_value"], domain="com.microsoft",
        num_heads=1, kv_num_heads=1, do_rotary=1)
    graph = helper.make_graph([node], "rotation", [
        info("rows", TensorProto.FLOAT, batch, new, 2 * HALF),
        *(info(name, TensorProto.FLOAT, batch, 1, past, 2 * HALF) for name in ("past_key", "past_value")),
        info("ends", TensorProto.INT32, batch), info("total", TensorProto.INT32, 1),
        *(info(name, TensorProto.FLOAT, 64, HALF) for name in ("cosines", "sines")),
        info("positions", TensorProto.INT64, batch, new),
    ], [info("present_key", TensorProto.FLOAT, batch, 1, past + new, 2 * HALF)])
    model = helper.make_model(graph, ir_version=8, opset_imports=[
        helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)])
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    angles = (np.arange(64)[:, None] * np.full((1, HALF), STEP)).astype(np.float32)
    rows = np.zeros((batch, new, 2 * HALF), np.float32)
    rows[..., :HALF] = 1
    cache = np.zeros((batch, 1, past, 2 * HALF), np.float32)
    (keys,) = session.run(None, {
        "rows": rows, "past_key": cache, "past_value": cache, "positions": positions,
        "ends": np.full(batch, past + new - 1, np.int32), "total": np.array([past + new], np.int32),
        "cosines": np.cos(angles), "sines": np.sin(angles)})
    new_keys = keys[:, 0, past:]
    return np.round(np.arctan2(new_keys[..., HALF], new_keys[..., 0]) / STEP).astype(int).tolist()

print(ort.__version__, "prompt [[5, 9, 2], [20, 21, 30]]:",
      rotated_at(0, np.array([[5, 9, 2], [20, 21, 30]])),
      "decode [[9], [21]]:", rotated_at(4, np.array([[9], [21]])),
      "chunk [[9, 2, 30]]:", rotated_at(4, np.array([[9, 2, 30]])))
PY
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q numpy==2.4.6 onnx==1.23.2
for version in 1.22.1 1.24.4 1.32.0; do
  "$place/env/bin/pip" install -q "onnxruntime==$version"
  "$place/env/bin/python" "$place/run.py"
done | tee "$place/seen"
diff "$place/seen" - <<'SEEN'
1.22.1 prompt [[5, 9, 2], [20, 21, 30]]: [[5, 6, 7], [5, 6, 7]] decode [[9], [21]]: [[9], [21]] chunk [[9, 2, 30]]: [[9, 2, 30]]
1.24.4 prompt [[5, 9, 2], [20, 21, 30]]: [[5, 6, 7], [5, 6, 7]] decode [[9], [21]]: [[9], [21]] chunk [[9, 2, 30]]: [[9, 2, 30]]
1.32.0 prompt [[5, 9, 2], [20, 21, 30]]: [[5, 6, 7], [5, 6, 7]] decode [[9], [21]]: [[9], [21]] chunk [[9, 2, 30]]: [[9, 2, 30]]
SEEN
echo "as it was"
