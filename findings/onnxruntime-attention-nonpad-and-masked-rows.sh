#!/usr/bin/env bash
# The standard Attention means something else in every few versions of ONNX Runtime, silently:
#  - nonpad_kv_seqlen (opset 24): without is_causal 1.24 reads all keys of the buffer, 1.25 on the
#    first n; with is_causal the rows stand at the start of the buffer up to 1.27 (top-left) and at
#    the end of its n keys since 1.28 (bottom-right), as the specification says by now;
#  - a row that a bool mask hides everything from: NaN in 1.23, the mean of V in 1.24 to 1.27, zeros
#    since 1.28; by -inf: NaN up to 1.27, zeros since; by the lowest finite number: the mean up to
#    1.27, zeros since, while -10000 gives the mean in all of them;
#  - softcap lets hidden keys through with the weight exp(-softcap) up to 1.26.
#
# Seen 2026-11-27, CPU provider, onnx 1.23.2, numpy 2.4.6: see the end of this file.
# Consequence: a prober states by the specification what these mean, and does not measure them with
# whatever is installed; a row without keys must not be compared.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
cat > "$place/run.py" <<'PY'
import numpy as np, onnxruntime as ort
from onnx import TensorProto, helper

SIZE = 8

def attend(opset, rows, keys, mask=None, real=None, **attributes):
    """Equal scores, values one-hot in the token: the output is the weights."""
    feeds = {"query": np.zeros((1, rows, SIZE), np.float32),
             "key": np.zeros((1, keys, SIZE), np.float32),
             "value": np.eye(keys, SIZE, dtype=np.float32)[None]}
    given = [*feeds, "" if mask is None else "mask"] + ([] if real is None else ["", "", "real"])
    feeds |= {} if mask is None else {"mask": mask}
    feeds |= {} if real is None else {"real": np.array([real])}
    node = helper.make_node("Attention", given, ["result"], q_num_heads=1, kv_num_heads=1, **attributes)
    graph = helper.make_graph([node], "attention", [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for name, x in feeds.items()
    ], [helper.make_tensor_value_info("result", TensorProto.FLOAT, [1, rows, SIZE])])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", opset)])
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, feeds)[0][0, :, :keys]

def seen(weights):
    return [np.flatnonzero(row > 0).tolist() for row in weights]

def masked(hidden, dtype):
    mask = np.zeros((2, 4), np.float32) if dtype is np.float32 else np.ones((2, 4), bool)
    mask[1] = hidden
    return np.round(attend(23, 2, 4, mask)[1], 2).tolist()

version = ort.__version__
if version >= "1.24":
    print(version, "n=6 of 8 keys:", seen(attend(24, 1, 8, real=6))[0],
          "causal:", seen(attend(24, 2, 8, real=6, is_causal=1)))
print(version, "row without keys: bool", masked(False, bool), "-inf", masked(-np.inf, np.float32),
      "lowest", masked(np.finfo(np.float32).min, np.float32), "-1e4", masked(-1e4, np.float32))
print(version, "softcap 2, two of four keys hidden:",
      [f"{x:.3f}" for x in attend(23, 1, 4, np.array([[True, True, False, False]]), softcap=2.0)[0]])
PY
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q numpy==2.4.6 onnx==1.23.2
for version in 1.23.2 1.24.4 1.26.0 1.27.0 1.28.0 1.32.0; do
  "$place/env/bin/pip" install -q "onnxruntime==$version"
  "$place/env/bin/python" "$place/run.py"
done | tee "$place/seen"
diff "$place/seen" - <<'SEEN'
1.23.2 row without keys: bool [nan, nan, nan, nan] -inf [nan, nan, nan, nan] lowest [0.25, 0.25, 0.25, 0.25] -1e4 [0.25, 0.25, 0.25, 0.25]
1.23.2 softcap 2, two of four keys hidden: ['0.440', '0.440', '0.060', '0.060']
1.24.4 n=6 of 8 keys: [0, 1, 2, 3, 4, 5, 6, 7] causal: [[0], [0, 1]]
1.24.4 row without keys: bool [0.25, 0.25, 0.25, 0.25] -inf [nan, nan, nan, nan] lowest [0.25, 0.25, 0.25, 0.25] -1e4 [0.25, 0.25, 0.25, 0.25]
1.24.4 softcap 2, two of four keys hidden: ['0.440', '0.440', '0.060', '0.060']
1.26.0 n=6 of 8 keys: [0, 1, 2, 3, 4, 5] causal: [[0], [0, 1]]
1.26.0 row without keys: bool [0.25, 0.25, 0.25, 0.25] -inf [nan, nan, nan, nan] lowest [0.25, 0.25, 0.25, 0.25] -1e4 [0.25, 0.25, 0.25, 0.25]
1.26.0 softcap 2, two of four keys hidden: ['0.440', '0.440', '0.060', '0.060']
1.27.0 n=6 of 8 keys: [0, 1, 2, 3, 4, 5] causal: [[0], [0, 1]]
1.27.0 row without keys: bool [0.25, 0.25, 0.25, 0.25] -inf [nan, nan, nan, nan] lowest [0.25, 0.25, 0.25, 0.25] -1e4 [0.25, 0.25, 0.25, 0.25]
1.27.0 softcap 2, two of four keys hidden: ['0.500', '0.500', '0.000', '0.000']
1.28.0 n=6 of 8 keys: [0, 1, 2, 3, 4, 5] causal: [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
1.28.0 row without keys: bool [0.0, 0.0, 0.0, 0.0] -inf [0.0, 0.0, 0.0, 0.0] lowest [0.0, 0.0, 0.0, 0.0] -1e4 [0.25, 0.25, 0.25, 0.25]
1.28.0 softcap 2, two of four keys hidden: ['0.500', '0.500', '0.000', '0.000']
1.32.0 n=6 of 8 keys: [0, 1, 2, 3, 4, 5] causal: [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
1.32.0 row without keys: bool [0.0, 0.0, 0.0, 0.0] -inf [0.0, 0.0, 0.0, 0.0] lowest [0.0, 0.0, 0.0, 0.0] -1e4 [0.25, 0.25, 0.25, 0.25]
1.32.0 softcap 2, two of four keys hidden: ['0.500', '0.500', '0.000', '0.000']
SEEN
echo "as it was"
