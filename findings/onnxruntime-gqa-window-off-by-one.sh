#!/usr/bin/env bash
# GroupQueryAttention's local_window_size=W lets a row see W+1 keys up to ONNX Runtime 1.23, and W
# keys since 1.24, in prompts, chunks and decode steps alike. 0 is "itself alone" up to 1.23, and
# since then every row sees nothing and gives zeros; only -1 is no window. No file says which
# version it was made for, and no version warns.
#
# Seen 2026-11-27, CPU provider, onnx 1.23.2, numpy 2.4.6: see the end of this file. Each list holds
# how many keys the rows see.
# Consequence: an exporter reads W as documented (W keys), refuses 0, and writes no
# local_window_size into a file that may meet an older version.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
cat > "$place/run.py" <<'PY'
import numpy as np, onnxruntime as ort
from onnx import TensorProto, helper

SIZE = 16

def info(name, kind, *shape):
    return helper.make_tensor_value_info(name, kind, shape)

def seen_keys(window, past, new):
    """Equal scores, values one-hot in the token: the output is the weights."""
    node = helper.make_node(
        "GroupQueryAttention", ["query", "key", "value", "past_key", "past_value", "ends", "total"],
        ["result", "present_key", "present_value"], domain="com.microsoft",
        num_heads=1, kv_num_heads=1, local_window_size=window)
    rows = [info(name, TensorProto.FLOAT, 1, "new", SIZE) for name in ("query", "key", "value")]
    cache = [info(name, TensorProto.FLOAT, 1, 1, "past", SIZE) for name in ("past_key", "past_value")]
    lengths = [info("ends", TensorProto.INT32, 1), info("total", TensorProto.INT32, 1)]
    graph = helper.make_graph([node], "window", [*rows, *cache, *lengths],
                              [info("result", TensorProto.FLOAT, 1, "new", SIZE)])
    model = helper.make_model(graph, ir_version=8, opset_imports=[
        helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)])
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    total = past + new
    hot, none = np.eye(total, SIZE, dtype=np.float32), np.zeros((1, new, SIZE), np.float32)
    (result,) = session.run(None, {
        "query": none, "key": none, "value": hot[None, past:],
        "past_key": np.zeros((1, 1, past, SIZE), np.float32), "past_value": hot[None, None, :past],
        "ends": np.array([total - 1], np.int32), "total": np.array([total], np.int32)})
    return (result[0] > 0).sum(axis=1).tolist()

for window in (3, 0, -1):
    print(ort.__version__, f"local_window_size={window}:", "prompt", seen_keys(window, 0, 6),
          "chunk", seen_keys(window, 5, 2), "decode", seen_keys(window, 9, 1))
PY
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q numpy==2.4.6 onnx==1.23.2
for version in 1.22.1 1.23.2 1.24.4 1.32.0; do
  "$place/env/bin/pip" install -q "onnxruntime==$version"
  "$place/env/bin/python" "$place/run.py"
done | tee "$place/seen"
diff "$place/seen" - <<'SEEN'
1.22.1 local_window_size=3: prompt [1, 2, 3, 4, 4, 4] chunk [4, 4] decode [4]
1.22.1 local_window_size=0: prompt [1, 1, 1, 1, 1, 1] chunk [1, 1] decode [1]
1.22.1 local_window_size=-1: prompt [1, 2, 3, 4, 5, 6] chunk [6, 7] decode [10]
1.23.2 local_window_size=3: prompt [1, 2, 3, 4, 4, 4] chunk [4, 4] decode [4]
1.23.2 local_window_size=0: prompt [1, 1, 1, 1, 1, 1] chunk [1, 1] decode [1]
1.23.2 local_window_size=-1: prompt [1, 2, 3, 4, 5, 6] chunk [6, 7] decode [10]
1.24.4 local_window_size=3: prompt [1, 2, 3, 3, 3, 3] chunk [3, 3] decode [3]
1.24.4 local_window_size=0: prompt [0, 0, 0, 0, 0, 0] chunk [0, 0] decode [0]
1.24.4 local_window_size=-1: prompt [1, 2, 3, 4, 5, 6] chunk [6, 7] decode [10]
1.32.0 local_window_size=3: prompt [1, 2, 3, 3, 3, 3] chunk [3, 3] decode [3]
1.32.0 local_window_size=0: prompt [0, 0, 0, 0, 0, 0] chunk [0, 0] decode [0]
1.32.0 local_window_size=-1: prompt [1, 2, 3, 4, 5, 6] chunk [6, 7] decode [10]
SEEN
echo "as it was"
