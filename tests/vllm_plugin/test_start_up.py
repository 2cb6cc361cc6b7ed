"""What is settled in the front end before an engine starts, on objects of the shape of vLLM's."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.vllm import start_up
from trianglemix.vllm.config import VARIABLE
from trianglemix.vllm.errors import ServingError
from trianglemix.vllm.start_up import settle, wrap_engine_config, wrap_requests

from tests.vllm_plugin.test_step import engine

PATTERN = TrianglePattern(4, 16, 8)


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    folders: list[Any] = []
    monkeypatch.setattr(start_up, "watch_counts", folders.append)
    monkeypatch.setattr(start_up, "_flash_attention", lambda: SimpleNamespace(name="FLASH_ATTN"))
    monkeypatch.delenv(VARIABLE, raising=False)
    return folders


def whole_engine(device: str = "cuda", layers: str = "1", **changes: Any) -> SimpleNamespace:
    """A `VllmConfig` that `check_engine` lets pass; `changes` are `part__name=value`."""
    config = engine(PATTERN, layers)
    config.device_config = SimpleNamespace(device_type=device)
    config.cache_config = SimpleNamespace(cache_dtype="auto", kv_sharing_fast_prefill=False)
    config.attention_config = SimpleNamespace(
        backend=None, backend_per_kind={}, flash_attn_version=None
    )
    config.speculative_config = None
    for name, value in {
        "use_mla": False, "is_encoder_decoder": False, "is_mm_prefix_lm": False,
        "runner_type": "generate", "disable_cascade_attn": False,
    }.items():  # fmt: skip
        setattr(config.model_config, name, value)
    config.parallel_config.prefill_context_parallel_size = 1
    config.parallel_config.decode_context_parallel_size = 1
    config.parallel_config.use_ubatching = False
    for path, value in changes.items():
        part, name = path.split("__")
        setattr(getattr(config, part), name, value)
    return config


def test_a_configuration_is_settled(watched: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    config = whole_engine()
    config.additional_config["another"] = 5
    with caplog.at_level(logging.INFO, "vllm.trianglemix"):
        settle(config, "0.26.0")
    assert config.additional_config == {
        "another": 5,
        "trianglemix": {"enabled": True, "layers": "1", "pattern": [4, 16, 8]},
    }
    assert config.model_config.disable_cascade_attn is True
    assert config.attention_config.backend.name == "FLASH_ATTN"
    assert "triangle layers 1, pattern 4 sinks, window 16, last 8" in caplog.text
    assert len(watched) == 1


def test_what_was_run_needs_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    settle(whole_engine("cpu"), "0.32.0+cpu")
    assert "never run" not in caplog.text


@pytest.mark.parametrize(
    ("version", "device"), [("0.32.0", "cuda"), ("0.33.0", "cpu"), ("0.33.0", "cuda")]
)
def test_what_was_never_run_is_said(
    version: str, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    settle(whole_engine(device), version)
    assert f"never run with vLLM {version[:4]} on {device}" in caplog.text


def test_without_a_section_nothing_is_touched(watched: list[Any]) -> None:
    config = whole_engine()
    config.additional_config = {}
    settle(config, "0.1.0")
    assert config.additional_config == {}
    assert config.attention_config.backend is None
    assert not watched


def test_the_variable_reaches_workers_through_the_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    config = whole_engine()
    settle(config, "0.26.0")
    assert config.additional_config["trianglemix"]["enabled"] is False
    monkeypatch.setenv(VARIABLE, "1")
    settle(config, "0.26.0")
    assert config.additional_config["trianglemix"]["enabled"] is True


@pytest.mark.parametrize(
    ("version", "device", "words"),
    [
        ("0.31.2", "cuda", "this is vLLM 0.31.2, but TriangleMix takes 0.26, 0.32, 0.33 only"),
        ("0.34.0+cpu", "cpu", "this is vLLM 0.34.0"),
        ("0.26.0", "cpu", "takes vLLM 0.26 on cuda only"),
        ("0.33.0", "xpu", "takes vLLM 0.33 on cpu and cuda only"),
    ],
)
def test_other_versions_are_refused_by_name(version: str, device: str, words: str) -> None:
    with pytest.raises(ServingError, match=words):
        settle(whole_engine(device), version)


@pytest.mark.parametrize(
    ("change", "value", "words"),
    [
        ("model_config__use_mla", True, "MLA"),
        ("model_config__is_encoder_decoder", True, "an encoder"),
        ("model_config__is_mm_prefix_lm", True, "inside images"),
        ("model_config__runner_type", "pooling", "run as 'pooling'"),
        ("parallel_config__prefill_context_parallel_size", 2, "among 2 devices in prefill"),
        ("parallel_config__decode_context_parallel_size", 4, "among 4 devices in decode"),
        ("parallel_config__use_ubatching", True, "--enable-dbo"),
        ("cache_config__cache_dtype", "fp8", "cache is quantised"),
        ("cache_config__kv_sharing_fast_prefill", True, "--kv-sharing-fast-prefill"),
        ("attention_config__backend", SimpleNamespace(name="FLASHINFER"), "is FLASHINFER, not"),
        ("attention_config__backend_per_kind", {"full": 1}, "by the kind of cache"),
        ("attention_config__flash_attn_version", 2, "FlashAttention 2 is asked for"),
    ],
)
def test_what_is_not_carried_is_refused(change: str, value: Any, words: str) -> None:
    with pytest.raises(ServingError, match=words):
        settle(whole_engine(**{change: value}), "0.26.0")


def test_adaptive_guessing_is_refused() -> None:
    config = whole_engine()
    config.speculative_config = SimpleNamespace(enable_adaptive_verification=True)
    with pytest.raises(ServingError, match="adaptive verification"):
        settle(config, "0.33.0")
    config.speculative_config = SimpleNamespace(method="ngram")
    settle(config, "0.33.0")


def test_all_reasons_are_said_at_once() -> None:
    config = whole_engine(model_config__use_mla=True, cache_config__cache_dtype="fp8")
    with pytest.raises(ServingError, match=r"MLA.*; .*quantised"):
        settle(config, "0.26.0")


def test_the_backend_that_was_asked_for_stays() -> None:
    chosen = SimpleNamespace(name="FLASH_ATTN")
    config = whole_engine(attention_config__backend=chosen)
    settle(config, "0.26.0")
    assert config.attention_config.backend is chosen


def test_wrapping_twice_settles_once(watched: list[Any]) -> None:
    class Args:
        def create_engine_config(self, usage: str, headless: bool = False) -> SimpleNamespace:
            assert (usage, headless) == ("a test", True)
            return whole_engine()

    for _ in range(2):
        wrap_engine_config(Args, "0.26.0")
    config = Args().create_engine_config("a test", headless=True)
    assert config.attention_config.backend is not None
    assert len(watched) == 1


def test_a_wrong_section_is_an_error_before_an_engine_starts() -> None:
    config = whole_engine(layers="1,7")
    with pytest.raises(ConfigurationError, match="layer 7, but the model has 3 layers"):
        settle(config, "0.26.0")


@pytest.mark.parametrize(("given", "ends"), [(None, ""), ("user", ":user")])
def test_requests_are_salted(given: str | None, ends: str) -> None:
    salts = set()
    for layers in ("1", "2", None):

        class Processor:
            vllm_config = whole_engine(layers=layers or "1")

            def process_inputs(self, salt: str | None) -> SimpleNamespace:
                return SimpleNamespace(cache_salt=salt)

        if layers is None:
            Processor.vllm_config.additional_config = {}
        wrap_requests(Processor)
        salt = Processor().process_inputs(given).cache_salt
        assert salt == given if layers is None else salt.endswith(ends)
        assert layers is None or salt.startswith("trianglemix-")
        salts.add(salt)
    assert len(salts) == 3
