"""The probe's gradients are those of a theta on the attention weights, by finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM
from trianglemix.analysis.gradients import probe
from trianglemix.analysis.sections import SECTIONS, LayerGradients, ProbeSample
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.custom_ops.triangle.pattern import keep_mask

from tests.tiny_models import tiny_folder

PATTERN = TrianglePattern(3, 6, 5)
LENGTH = 60


class ThetaModel:
    """A tiny model whose attention weights are multiplied by `theta[layer]`, in float64."""

    def __init__(self, family: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            tiny_folder(family), dtype=torch.float64
        ).eval()
        self.theta = torch.ones(3, LENGTH, LENGTH, dtype=torch.float64)
        self.softcap = getattr(self.model.config, "attn_logit_softcapping", None)
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(0, 250, (LENGTH,), generator=generator)

    def sample(self) -> ProbeSample:
        return ProbeSample(tuple(self.ids.tolist()), 77)

    def logit(self, theta: Tensor) -> Tensor:
        """The answer's logit with this theta."""

        def attention(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
        ) -> tuple[Tensor, None]:
            group = query.shape[1] // key.shape[1]
            k, v = (x.repeat_interleave(group, 1) for x in (key, value))
            scores = query @ k.transpose(2, 3) * given["scaling"]
            if self.softcap:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            seen = torch.ones(LENGTH, LENGTH).tril().bool()
            if window := given.get("sliding_window"):
                seen &= ~torch.ones(LENGTH, LENGTH).tril(-window).bool()
            weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1)
            return ((weights * theta[module.layer_idx]) @ v).transpose(1, 2), None

        AttentionInterface.register("theta", attention)
        self.model.set_attn_implementation("theta")
        result: Tensor = self.model(self.ids[None]).logits[0, -1, 77]
        return result


def sections() -> list[Tensor]:
    """Streaming, Middle, Last of the pattern, from the predicate."""
    triangle = torch.from_numpy(keep_mask(LENGTH, PATTERN))
    endless = TrianglePattern(PATTERN.num_sink_tokens, PATTERN.sliding_window_size, 1)
    streaming = torch.from_numpy(keep_mask(LENGTH + 1, endless))[:LENGTH, :LENGTH]
    causal = torch.ones(LENGTH, LENGTH).tril().bool()
    return [streaming, causal & ~triangle, triangle & ~streaming]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_section_means_agree_with_finite_differences(family: str) -> None:
    tiny = ThetaModel(family)
    found = probe(tiny.model, tiny.sample(), PATTERN, chunk=17)
    step = 3e-3  # RMSNorm computes in float32 even here: a small step would measure its rounding
    with torch.no_grad():
        for layer in range(3):
            for s, section in enumerate(sections()):
                up, down = tiny.theta.clone(), tiny.theta.clone()
                up[layer][section] += step
                down[layer][section] -= step
                slope = float(tiny.logit(up) - tiny.logit(down)) / (2 * step)
                mean = slope / int(section.sum())
                size = found.mean_abs[layer][s]
                assert abs(found.mean[layer][s] - mean) <= 1e-3 * size, (SECTIONS[s], layer)


def test_mean_absolute_values_agree_with_torch() -> None:
    tiny = ThetaModel("llama")
    found = probe(tiny.model, tiny.sample(), PATTERN)
    theta = tiny.theta.requires_grad_()
    gradient = torch.autograd.grad(tiny.logit(theta), theta)[0].detach()
    for layer in range(3):
        for s, section in enumerate(sections()):
            expected = float(gradient[layer][section].abs().mean())
            assert found.mean_abs[layer][s] == pytest.approx(expected, rel=1e-6)


def test_chunks_of_rows_change_nothing_and_the_model_is_left_as_it_was() -> None:
    tiny = ThetaModel("qwen3")
    tiny.model.set_attn_implementation("sdpa")
    before = tiny.model(tiny.ids[None]).logits
    runs: list[LayerGradients] = [
        probe(tiny.model, tiny.sample(), PATTERN, chunk=chunk) for chunk in (1, 13, 1000)
    ]
    for other in runs[1:]:
        torch.testing.assert_close(torch.tensor(runs[0].mean), torch.tensor(other.mean))
        torch.testing.assert_close(torch.tensor(runs[0].mean_abs), torch.tensor(other.mean_abs))
    assert tiny.model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(tiny.model(tiny.ids[None]).logits, before)
