#!/bin/bash
# mobius-onnx writes "dynamic" rotary scaling as a table that is scaled at every length.
#
# transformers scales dynamically: up to max_position_embeddings the frequencies are the plain
# ones. The graph holds one table, made with the whole factor, so that even a text of two tokens
# is rotated otherwise than in the model. Exits with 1 where that is no longer so.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q mobius-onnx==0.1.0 transformers==5.23.0 onnx==1.23.2 \
    onnx-ir==1.1.0 torch==2.13.0
mkdir "$place/folder"
cat > "$place/make.py" <<'PYTHON'
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM

scaling = {"rope_type": "dynamic", "factor": 2.0}
config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                     num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                     max_position_embeddings=512, rope_scaling=scaling)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
PYTHON
cat > "$place/compare.py" <<'PYTHON'
import sys
from importlib.metadata import version
import numpy as np
import onnx_ir as ir
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

folder, path = sys.argv[1:]
table = next(value.const_value.numpy() for name, value in ir.load(path).graph.initializers.items()
             if name.endswith("cos_cache"))
found = np.arccos(np.clip(table[1], -1, 1))[:4]
model = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder)).inv_freq.numpy()[:4]
base, width, factor = 10000.0, 16, 2.0
whole = (base * factor ** (width / (width - 2))) ** -(np.arange(0, width, 2) / width)[:4]
print("mobius-onnx", version("mobius-onnx"), "transformers", version("transformers"))
print("angles of position 1 in transformers, up to 512 tokens:", model)
print("angles of position 1 in the graph                     :", found)
print("angles with the whole factor of 2                     :", whole)
as_seen = np.allclose(found, whole, rtol=2e-3) and not np.allclose(found, model, rtol=1e-2)
print("still so" if as_seen else "changed")
sys.exit(not as_seen)
PYTHON
"$place/env/bin/python" "$place/make.py" "$place/folder" 2> /dev/null
"$place/env/bin/mobius" build --config "$place/folder" --runtime ort-genai "$place/graph" \
    > /dev/null 2>&1
"$place/env/bin/python" "$place/compare.py" "$place/folder" "$place/graph/model.onnx"
