#!/usr/bin/env bash
# flex_attention without torch.compile ignores the block lists of its BlockMask: only mask_mod counts.
#
# BlockMask.from_kv_blocks takes which blocks of keys each tile of rows sees, and mask_mod may be
# left out: then every block of the lists is seen whole. Compiled, that is what comes out. Not
# compiled, the same call attends to every key; the warning that it gives is about speed and memory
# alone. The documentation calls block_mask what "controls the blocksparsity pattern of the
# attention". Masks of create_block_mask do not show it, since their lists follow from mask_mod.
#
# Seen 2026-11-28, torch 2.13.0 on a CPU: see the end of this file. Each line holds the largest
# difference from attention inside the listed blocks, and from attention to every key.
# Consequence: whoever tries a mask of listed blocks without compiling it sees another model. Our
# mask_mod repeats the lists.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
cat > "$place/run.py" <<'PY'
import warnings

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

warnings.simplefilter("ignore")
BLOCK, BLOCKS, SIZE = 128, 3, 16
torch.manual_seed(0)
query, key, value = (torch.randn(1, 1, BLOCK * BLOCKS, SIZE) for _ in range(3))
count = torch.ones(1, 1, BLOCKS, dtype=torch.int32)
own = torch.arange(BLOCKS, dtype=torch.int32).view(1, 1, BLOCKS, 1)  # each tile sees its own block
own = torch.cat([own, own.new_zeros(1, 1, BLOCKS, BLOCKS - 1)], -1)
none, nowhere = torch.zeros_like(count), torch.zeros_like(own)
masks = {
    "partial blocks": BlockMask.from_kv_blocks(count, own, BLOCK_SIZE=BLOCK),
    "full blocks": BlockMask.from_kv_blocks(none, nowhere, count, own, BLOCK_SIZE=BLOCK),
}
block = torch.arange(BLOCK * BLOCKS) // BLOCK
attend = torch.nn.functional.scaled_dot_product_attention
listed = attend(query, key, value, attn_mask=block[:, None] == block)
everything = attend(query, key, value)

print("torch", torch.__version__.partition("+")[0])
with torch.no_grad():
    for name, mask in masks.items():
        for how, run in (("not compiled", flex_attention), ("compiled", torch.compile(flex_attention))):
            output = run(query, key, value, block_mask=mask)
            apart = [f"{(output - x).abs().max():.3f}" for x in (listed, everything)]
            print(f"{name}, {how}: {' and '.join(apart)}")
PY
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$place/env/bin/python" "$place/run.py" | tee "$place/seen"
diff "$place/seen" - <<'SEEN'
torch 2.13.0
partial blocks, not compiled: 0.624 and 0.000
partial blocks, compiled: 0.000 and 0.624
full blocks, not compiled: 0.624 and 0.000
full blocks, compiled: 0.000 and 0.624
SEEN
echo "as it was"
