"""A folder that cannot be run says why, and the slow function body never runs unasked."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
from trianglemix.custom_ops.errors import TriangleMixError
from trianglemix.runtime import TriangleSession
from trianglemix.runtime.backends import ort as ort_backend
from trianglemix.runtime.backends.ort import FALLBACK_SCORE_BYTES
from trianglemix.runtime.backends.ort_cache import GrowingCache
from trianglemix.runtime.backends.providers import PROVIDERS, warn_without_kernel
from trianglemix.runtime.errors import FallbackError, ProviderError

from tests.runtime.conftest import FolderMaker, prompt
from tests.runtime.tiny_folder import HEADS, TinyFolder


def _error(folder: Path, **arguments: Any) -> str:
    with pytest.raises(TriangleMixError) as caught:
        TriangleSession.from_folder(folder, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.usefixtures("no_library")
def test_fallback_is_refused_unasked(folder: Path) -> None:
    assert "allow_fallback=True" in _error(folder)


@pytest.mark.usefixtures("no_library")
def test_no_fallback_is_offered_that_the_model_does_not_carry(copy: Path) -> None:
    """As exports for CUDA, whose nodes rotate inside."""
    path = copy / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    del model.functions[:]
    onnx.save(model, path)
    for allowed in (False, True):
        message = _error(copy, allow_fallback=allowed)
        assert "carries no function body" in message
        assert "allow_fallback" not in message


def test_fallback_gives_the_same_tokens(
    session: TriangleSession,
    folder: Path,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = session.generate(prompt(60), 10)
    request.getfixturevalue("no_library")  # only now: the session above has it
    slow = TriangleSession.from_folder(folder, allow_fallback=True)
    assert "slow function body" in caplog.text
    result = slow.generate(prompt(60), 10, prefill_chunk=16)
    assert (expected.kernel, result.kernel, slow.kernel) == ("native", "fallback", "fallback")
    assert result.ids == expected.ids
    assert isinstance(slow.backend.open_cache(1, 64), GrowingCache)


def test_a_library_that_does_not_load_is_a_missing_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "libtrianglemix_ops.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(ort_backend, "library_path", lambda: broken)
    assert "refuses the native library" in _error(folder)


@pytest.mark.usefixtures("no_library")
def test_fallback_that_does_not_fit_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = TriangleSession.from_folder(folder, allow_fallback=True)
    room = HEADS * 100 * 100 * FALLBACK_SCORE_BYTES
    monkeypatch.setattr(ort_backend, "available_host_bytes", lambda: room)
    session.generate(prompt(100), 1)
    with pytest.raises(FallbackError, match="101 new tokens over 101"):
        session.generate(prompt(101), 1)
    session.generate(prompt(200), 1, prefill_chunk=50)


@pytest.mark.usefixtures("no_library")
def test_the_dense_twin_needs_no_library(make_folder: FolderMaker) -> None:
    dense = make_folder(TinyFolder(group_query_attention=True))
    assert TriangleSession.from_folder(dense).kernel == "native"


def test_missing_onnxruntime_names_the_extras(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.startswith("trianglemix.runtime.backends.ort"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = _error(folder)
    assert "trianglemix[cpu]" in message
    assert "trianglemix[gpu]" in message


def test_providers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert TriangleSession.from_folder(folder, "auto").provider == "cpu"
    assert "trianglemix[gpu]" in _error(folder, provider="cuda")
    assert "'tpu'" in _error(folder, provider="tpu")


def test_a_cuda_provider_that_does_not_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class OnlyCpu(onnxruntime.InferenceSession):
        def __init__(self, path: str, options: Any, providers: list[str]) -> None:
            assert providers[0] == "CUDAExecutionProvider"
            super().__init__(path, options, providers=["CPUExecutionProvider"])

    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession", OnlyCpu)
    with pytest.raises(ProviderError, match="could not start its cuda provider"):
        TriangleSession.from_folder(folder, "cuda")
    assert TriangleSession.from_folder(folder, "auto").provider == "cpu"
    assert "running on the CPU" in caplog.text


class WithProvider(onnxruntime.InferenceSession):  # type: ignore[misc]
    """A session that says it has every provider asked for, and runs on the CPU."""

    asked: ClassVar[list[list[str]]] = []

    def __init__(self, path: str, options: Any, providers: list[str]) -> None:
        super().__init__(path, options, providers=["CPUExecutionProvider"])
        self.asked.append(providers)

    def get_providers(self) -> list[str]:
        return self.asked[-1]


@pytest.fixture
def many_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for provider in PROVIDERS.values() for name in provider.onnxruntime]
    available = [name for name in dict.fromkeys(names) if not name.startswith("CUDA")]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "InferenceSession", WithProvider)


@pytest.mark.usefixtures("many_providers")
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("tensorrt", "TensorrtExecutionProvider"),
        ("openvino", "OpenVINOExecutionProvider"),
        ("webgpu", "WebGpuExecutionProvider"),
        ("directml", "DmlExecutionProvider"),
        ("coreml", "CoreMLExecutionProvider"),
    ],
)
def test_a_provider_without_kernel_is_said(
    name: str, theirs: str, folder: Path, session: TriangleSession, caplog: pytest.LogCaptureFixture
) -> None:
    expected = session.generate(prompt(60), 5).ids
    slow = TriangleSession.from_folder(folder, name)
    assert WithProvider.asked[-1] == [theirs, "CPUExecutionProvider"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{theirs} has no kernel for TriangleAttention: ")
    assert "run in the CPU kernel" in line
    assert "copies" in line
    assert line.endswith("use the provider cpu or cuda")
    result = slow.generate(prompt(60), 5)
    assert (result.ids, slow.provider) == (expected, name)


@pytest.mark.usefixtures("many_providers", "no_library")
def test_without_the_library_such_a_provider_gets_the_function_body(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    TriangleSession.from_folder(folder, "openvino", allow_fallback=True)
    assert "runs there as its function body" in caplog.text


@pytest.mark.usefixtures("many_providers")
def test_nothing_is_said_where_every_node_is_known(
    folder: Path, make_folder: FolderMaker, caplog: pytest.LogCaptureFixture
) -> None:
    TriangleSession.from_folder(folder, "cpu")
    TriangleSession.from_folder(make_folder(TinyFolder(group_query_attention=True)), "openvino")
    assert not caplog.records


def test_cuda_behind_tensorrt_is_named(caplog: pytest.LogCaptureFixture) -> None:
    tensorrt = PROVIDERS["tensorrt"]
    warn_without_kernel(tensorrt, "native", list(tensorrt.onnxruntime))
    assert "run in the CUDA kernel" in caplog.text


def test_another_provider_that_does_not_start_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnlyCpu(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, path: str, options: Any, providers: list[str]) -> None:
            super().__init__(path, options, providers=["CPUExecutionProvider"])

    both = ["WebGpuExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    monkeypatch.setattr(onnxruntime, "InferenceSession", OnlyCpu)
    assert "could not start its webgpu provider" in _error(folder, provider="webgpu")
    assert "install the ONNX Runtime that brings it" in _error(folder, provider="coreml")


def test_operator_on_the_cpu_of_a_cuda_session_is_said(
    session: TriangleSession, caplog: pytest.LogCaptureFixture
) -> None:
    ort_backend._warn_of_cpu_operator(session.backend.session)  # a session with all on the CPU
    assert "runs on the CPU, which is slow" in caplog.text


def test_missing_and_broken_files(copy: Path, tmp_path: Path) -> None:
    assert "nowhere is no folder with a manifest.json" in _error(tmp_path / "nowhere")
    (copy / "generation_config.json").write_text("[1]")
    assert "generation_config.json holds no JSON object" in _error(copy)
    (copy / "generation_config.json").unlink()
    model = copy / "model.onnx"
    model.write_bytes(model.read_bytes()[:5000])
    assert "model.onnx cannot be loaded" in _error(copy)
    model.unlink()
    assert "model.onnx is missing" in _error(copy)


@pytest.mark.usefixtures("no_library")
def test_broken_model_without_library(copy: Path) -> None:
    (copy / "model.onnx").write_bytes(b"\x08no model")
    assert "model.onnx cannot be loaded" in _error(copy)


def test_without_tokenizer_ids_still_work(copy: Path, session: TriangleSession) -> None:
    (copy / "tokenizer.json").unlink()
    silent = TriangleSession.from_folder(copy)
    result = silent.generate([1, 2, 3], 4)
    assert result.ids == session.generate([1, 2, 3], 4).ids
    assert result.text == ""
    with pytest.raises(TriangleMixError, match="give token ids"):
        silent.generate("text", 4)


def test_bfloat16_logits_are_read() -> None:
    from trianglemix.runtime.backends.ort_cache import read_last_row

    values = np.array([[[9, 9, 9], [1.0, -2.5, 3e38]]], np.float32)
    halves = (values.view(np.uint32) >> 16).astype(np.uint16)
    tensor = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(halves, 16)
    np.testing.assert_allclose(read_last_row(tensor), values[:, -1], rtol=0.01)
