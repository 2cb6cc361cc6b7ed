"""The gradient probe: how much each section of each layer matters for the right answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from trianglemix.analysis.errors import AnalysisError
from trianglemix.analysis.model import candidate_layers
from trianglemix.analysis.probed_attention import (
    DEFAULT_CHUNK,
    ProbeSettings,
    probed_attention,
)
from trianglemix.analysis.sections import SECTIONS, LayerGradients, ProbeSample
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.pytorch.attention_call import check_call, row_mask
from trianglemix.pytorch.dry_call import check_attention, use_attention

_IMPLEMENTATION: Final = "trianglemix_probe"


def probe(
    model: nn.Module, sample: ProbeSample, pattern: TrianglePattern, chunk: int = DEFAULT_CHUNK
) -> LayerGradients:
    """One forward and one backward pass; `y` is the logit of the answer's first token.

    The model may be on any device and in any float type; its parameters get no gradients. Layers
    without attention hold zeros.

    Raises:
        AnalysisError: the logit does not depend on some layer's attention.
        UnsupportedModelError: the model does not go through transformers' attention interface, or
            its attention is not plain causal attention.
    """
    any_model: Any = model
    candidates = candidate_layers(any_model.config)
    check_attention(model, candidates)
    layers = any_model.config.get_text_config().num_hidden_layers
    sums = torch.zeros(layers, len(SECTIONS), 3, dtype=torch.float64)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    embed = any_model.get_input_embeddings()
    with _probing(any_model, pattern, chunk, sums), _differentiable(embed), torch.enable_grad():
        ids = torch.tensor([sample.ids], device=embed.weight.device)
        output = any_model(input_ids=ids, use_cache=False, logits_to_keep=1)
        output.logits[0, -1, sample.answer].backward()
    silent = [layer for layer in candidates if sums[layer, 0, 2] == 0]
    if silent:
        raise AnalysisError(
            f"no gradient arrived at the attention of layers {silent}; the model does not use "
            "transformers' attention interface there, so it cannot be probed"
        )
    means = sums[:, :, :2] / sums[:, :, 2:].clamp(min=1)
    return LayerGradients(means[:, :, 0].tolist(), means[:, :, 1].tolist())


@contextmanager
def _probing(model: Any, pattern: TrianglePattern, chunk: int, sums: Tensor) -> Iterator[None]:
    from transformers import AttentionInterface, AttentionMaskInterface

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any
    ) -> tuple[Tensor, None]:
        rows = check_call(module, attention_mask, given.pop("dropout", None) or 0.0, given)
        scale = given.get("scaling")
        settings = ProbeSettings(
            pattern,
            query.shape[3] ** -0.5 if scale is None else scale,
            given.get("softcap") or 0.0,
            rows.window,
            chunk,
        )
        output = probed_attention(query, key, value, settings, sums[module.layer_idx])
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register(_IMPLEMENTATION, attention)
    AttentionMaskInterface.register(_IMPLEMENTATION, row_mask)
    previous = model.config.get_text_config()._attn_implementation
    training = model.training
    model.eval()
    use_attention(model, _IMPLEMENTATION)
    try:
        yield
    finally:
        use_attention(model, previous)
        model.train(training)


def _start_gradients(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.detach().requires_grad_().clone()  # a copy: some models change it in place


@contextmanager
def _differentiable(embed: nn.Module) -> Iterator[None]:
    """Gradients start at the embeddings, so that no parameter needs one."""
    hook = embed.register_forward_hook(_start_gradients)
    try:
        yield
    finally:
        hook.remove()
