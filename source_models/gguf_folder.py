"""A GGUF file as a Hugging Face folder: config, tokenizer, generation settings, float32 weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save_gguf_folder(path: Path, target: Path) -> None:
    """Writes the folder `target` from the GGUF file `path`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source: dict[str, Any] = {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=torch.float32, **source, **_dequantize()
    )
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _dequantize() -> dict[str, Any]:
    """transformers 5 must be asked for plain weights, else saving raises; 4.57 knows no other."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
