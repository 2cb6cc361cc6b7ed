"""On a CUDA GPU: the same tokens as on the CPU, with the cache in the GPU's memory."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
from trianglemix.runtime import TriangleSession
from trianglemix.runtime.backends.ort_cache import SharedCache

from tests.runtime.conftest import FolderMaker, prompt
from tests.runtime.tiny_folder import TinyFolder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
        reason="the installed ONNX Runtime has no CUDA provider",
    ),
]


def _sessions(folder: Path) -> tuple[TriangleSession, TriangleSession]:
    return TriangleSession.from_folder(folder, "cuda"), TriangleSession.from_folder(folder, "cpu")


@pytest.mark.parametrize("shared_cache", [True, False])
@pytest.mark.parametrize("chunk", [None, 16])
def test_tokens_are_those_of_the_cpu(
    shared_cache: bool, chunk: int | None, make_folder: FolderMaker
) -> None:
    cuda, cpu = _sessions(make_folder(TinyFolder(shared_cache=shared_cache)))
    prompts = [prompt(length) for length in (60, 1, 23)]
    results = cuda.generate(prompts, 10, prefill_chunk=chunk)
    assert [result.ids for result in results] == [
        result.ids for result in cpu.generate(prompts, 10, prefill_chunk=chunk)
    ]
    assert {(result.provider, result.kernel) for result in results} == {("cuda", "native")}


def test_the_dense_twin_in_float16(make_folder: FolderMaker) -> None:
    spec = TinyFolder(group_query_attention=True, dtype="float16")
    cuda, _ = _sessions(make_folder(spec))
    whole = cuda.generate(prompt(60), 10)
    assert len(set(whole.ids)) > 3
    assert cuda.generate(prompt(60), 10, prefill_chunk=16).ids == whole.ids


def test_the_cache_is_on_the_gpu_and_grows_there(folder: Path) -> None:
    cuda, cpu = _sessions(folder)
    ours, theirs = cuda.new_cache(), cpu.new_cache()
    for length in (30, 90, 150):  # 64, 192 and more slots
        expected = cpu.generate(prompt(length), 5, cache=theirs)
        assert cuda.generate(prompt(length), 5, cache=ours).ids == expected.ids
    assert isinstance(ours._device, SharedCache)
    for buffer in ours._device.buffers.values():
        assert buffer.device_name() == "cuda"
        assert buffer.shape()[2] == ours._device.slots >= ours.length


def test_no_warning_of_attention_on_the_cpu(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    TriangleSession.from_folder(folder, "cuda")
    assert not caplog.records
