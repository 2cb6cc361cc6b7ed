#!/usr/bin/env bash
# In transformers 5.23 the cache of models with multi-head latent attention (DeepSeek V2 and V3,
# MiniCPM3, Youtu) holds what is still compressed: "keys" [B, 1, T, kv_lora_rank] and "values"
# [B, 1, T, qk_rope_head_dim], one head each, the rotary part in the *values*. The attention
# function of the same layer is handed keys and values of every head. 4.57.6 kept those in the
# cache. So sizes of an exported graph's past and present that are read from the cache are wrong in
# one of the two versions, and a value cache is no cache of values.
#
# Seen 2026-11-27, torch 2.13.0 on the CPU (4 heads, rank 12, 16 + 8 key sizes, 16 value sizes):
#   transformers 5.23.0  cache (1, 1, 5, 12) (1, 1, 5, 8)   attention (1, 4, 5, 24) (1, 4, 5, 16)
#   transformers 4.57.6  cache (1, 4, 5, 24) (1, 4, 5, 16)  attention (1, 4, 5, 24) (1, 4, 5, 16)
# Consequence: measure a layer's sizes where its attention function is called.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
cat > "$place/run.py" <<'PY'
import logging, sys, warnings
warnings.simplefilter("ignore")
import torch, transformers
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=1,
             num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=12, q_lora_rank=20,
             qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, first_k_dense_replace=1)
seen = []

def attention(module, query, key, value, mask, **given):
    seen[:] = [tuple(key.shape), tuple(value.shape)]
    weights = torch.softmax(query @ key.transpose(2, 3) * query.shape[3] ** -0.5, -1)
    return (weights @ value).transpose(1, 2).contiguous(), None

AttentionInterface.register("shapes", attention)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **sizes)).eval()
model.set_attn_implementation("shapes")
with torch.no_grad():
    cache = model(torch.arange(5)[None], use_cache=True).past_key_values
layer = cache.layers[0]
held = [tuple(layer.keys.shape), tuple(layer.values.shape)]
print("transformers", transformers.__version__, "cache", *held, " attention", *seen)
PY
python3 -m venv "$place/env"
pip() { "$place/env/bin/python" -m pip install -q "$@"; }
pip torch==2.13.0 numpy==2.4.6
for version in 5.23.0 4.57.6; do
  pip "transformers==$version"
  "$place/env/bin/python" "$place/run.py" 2> /dev/null | tee -a "$place/seen"
done
cat > "$place/expected" <<'TXT'
transformers 5.23.0 cache (1, 1, 5, 12) (1, 1, 5, 8)  attention (1, 4, 5, 24) (1, 4, 5, 16)
transformers 4.57.6 cache (1, 4, 5, 24) (1, 4, 5, 16)  attention (1, 4, 5, 24) (1, 4, 5, 16)
TXT
diff "$place/seen" "$place/expected" && echo "as seen"
