"""Offline models through pyACL, with a stand-in for the module: numbers, copies, nothing leaks."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from trianglemix.exporter.targets.ascend.options import AscendRequest
from trianglemix.runtime.backends import om
from trianglemix.runtime.backends.acl_runtime import AclRuntime
from trianglemix.runtime.backends.backend import as_float32
from trianglemix.runtime.backends.om import open_om_backend
from trianglemix.runtime.backends.om_acl import AclDevice
from trianglemix.runtime.backends.static_cache import StaticBackend
from trianglemix.runtime.errors import ExecutionError, FolderError, MissingPackageError
from trianglemix.runtime.model_folder import ModelFolder
from trianglemix.runtime.session import TriangleSession

from tests.exporter.targets.ascend.exported import CHUNK, SLOTS, export_ascend, prompt, tiny_source
from tests.exporter.targets.ascend.half_model import save_half
from tests.runtime.fake_acl import FakeAcl


@pytest.fixture(scope="module", params=["block", "float16", "custom"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    source = tiny_source("qwen2")
    if request.param != "block":
        source = save_half(source, place / "half" / "model.onnx")
    lowering = "custom" if request.param == "custom" else "block"
    export_ascend(source, place / "out", AscendRequest("Ascend910B3", CHUNK, SLOTS, None, lowering))
    for file in (place / "out").glob("*.onnx"):
        file.with_suffix(".om").write_text("om")
    return place / "out"


@pytest.fixture
def acl(monkeypatch: pytest.MonkeyPatch) -> FakeAcl:
    device = FakeAcl()
    monkeypatch.setitem(sys.modules, "acl", device.module)
    return device


def test_tokens_of_the_graphs_and_nothing_leaks(folder: Path, acl: FakeAcl) -> None:
    npu = TriangleSession.from_folder(folder, provider="npu")
    cpu = TriangleSession.from_folder(folder, provider="cpu")
    assert npu.provider == "npu"
    for length in (3, 16, 49, 120):
        assert npu.generate(prompt(length), 5).ids == cpu.generate(prompt(length), 5).ids
    first, second = npu.new_cache(SLOTS), npu.new_cache(SLOTS)  # two sequences side by side
    want = cpu.new_cache(SLOTS)
    for turn in range(2):
        ids = prompt(40, seed=turn)
        got = npu.generate(ids, 4, cache=first).ids
        npu.generate(prompt(33, seed=9), 3, cache=second)
        assert got == cpu.generate(ids, 4, cache=want).ids
    assert acl.leaks
    del npu, first, second
    gc.collect()
    assert acl.leaks == {}
    assert acl.calls[-1] == "acl_finalize"


def test_a_cache_is_given_back_before_the_device(folder: Path, acl: FakeAcl) -> None:
    session = TriangleSession.from_folder(folder, provider="npu")
    session.generate(prompt(40), 2)
    gc.collect()
    before = len(acl.memory)
    cache = session.new_cache(SLOTS)
    session.generate(prompt(40), 2, cache=cache)
    assert len(acl.memory) == before + 2 * len(session.manifest.cache)
    del cache
    gc.collect()
    assert len(acl.memory) == before


def test_the_cache_stays_on_the_device(folder: Path, acl: FakeAcl) -> None:
    session = TriangleSession.from_folder(folder, provider="npu")
    cache = session.new_cache(SLOTS)
    session.generate(prompt(100), 1, cache=cache)
    up, down = acl.bytes_to_device, acl.bytes_to_host
    session.generate([5], 1, cache=cache)
    layer = session.manifest.cache[0]
    one_tensor = layer.kv_num_heads * SLOTS * layer.head_size * 2
    logits = next(
        tensor.nbytes
        for tensor in session.manifest.static.decode.outputs  # type: ignore[union-attr]
        if tensor.name == session.manifest.logits
    )
    assert acl.bytes_to_device - up < 1000 < one_tensor
    assert acl.bytes_to_host - down <= 2 * logits


def test_leaks_would_be_seen(folder: Path, acl: FakeAcl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AclRuntime, "release", lambda *_: None)
    session = TriangleSession.from_folder(folder, provider="npu")
    session.generate(prompt(5), 2)
    del session
    gc.collect()
    assert set(acl.leaks) == {"memory", "datasets", "buffers"}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("mdl_execute", r"tail\.om failed to run: acl\.mdl\.execute failed with 507011: EZ9999"),
        ("rt_malloc", r"acl\.rt\.malloc \(\d+ B\) failed with 507011"),
        ("rt_memset", r"acl\.rt\.memset failed with 507011"),
        ("mdl_load_from_file", r"load_from_file \(.*tail\.om\) failed with 507011: EZ9999: Inner"),
        ("rt_memcpy", r"acl\.rt\.memcpy to the device failed with 507011"),
        ("rt_memcpy_async", r"acl\.rt\.memcpy_async failed with 507011"),
    ],
)
def test_a_failing_call_is_named_and_everything_is_given_back(
    folder: Path, acl: FakeAcl, function: str, message: str
) -> None:
    session = TriangleSession.from_folder(folder, provider="npu")
    acl.fail[function] = 507011
    with pytest.raises(ExecutionError, match=message):
        session.generate(prompt(5), 2)
    acl.fail.clear()
    assert len(session.generate(prompt(5), 2).ids) == 2  # the device itself is still good
    del session
    gc.collect()
    assert acl.leaks == {}


def test_a_device_that_cannot_be_had(folder: Path, acl: FakeAcl) -> None:
    acl.fail["rt_set_device"] = 107001
    with pytest.raises(ExecutionError, match=r"acl\.rt\.set_device failed with 107001"):
        TriangleSession.from_folder(folder, provider="npu")
    assert acl.leaks == {}


def test_a_failed_call_leaves_the_cache_as_it_was(folder: Path, acl: FakeAcl) -> None:
    session = TriangleSession.from_folder(folder, provider="npu")
    cache = session.new_cache(SLOTS)
    session.generate(prompt(40), 1, cache=cache)
    acl.fail["mdl_execute"] = 1
    with pytest.raises(ExecutionError):
        session.generate(prompt(20, seed=1), 4, cache=cache)
    acl.fail.clear()
    again = session.generate(prompt(20, seed=1), 4, cache=cache).ids
    fresh = session.new_cache(SLOTS)
    session.generate(prompt(40), 1, cache=fresh)
    assert again == session.generate(prompt(20, seed=1), 4, cache=fresh).ids


def test_an_offline_model_of_another_export(folder: Path, acl: FakeAcl, tmp_path: Path) -> None:
    session = TriangleSession.from_folder(folder, provider="npu")
    file = folder / "tail.onnx"
    content = file.read_bytes()
    try:
        file.write_bytes((folder / "decode.onnx").read_bytes())
        with pytest.raises(ExecutionError, match=r"tail\.om has inputs of \[32, .*run build_om"):
            session.generate(prompt(5), 2)
    finally:
        file.write_bytes(content)


def test_another_user_of_cann_in_this_process_keeps_it(folder: Path, acl: FakeAcl) -> None:
    acl.initialized = True
    acl.fail["acl_init"] = 100002  # initialized already
    session = TriangleSession.from_folder(folder, provider="npu")
    session.generate(prompt(5), 2)
    del session
    gc.collect()
    assert acl.leaks == {"initialized": 1}
    assert "rt_reset_device" not in acl.calls


def test_missing_offline_model_names_the_script(folder: Path, acl: FakeAcl) -> None:
    session = TriangleSession.from_folder(folder, provider="npu")
    (folder / "tail.om").unlink()
    try:
        with pytest.raises(FolderError, match=r"tail\.om is missing; run build_om\.sh"):
            session.generate(prompt(5), 2)
    finally:
        (folder / "tail.om").write_text("om")


def test_bfloat16_logits_are_read_from_their_bits() -> None:
    numbers = np.array([[1.5, -2.0, 0.0, 3.0e38]], np.float32)
    bits = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    np.testing.assert_allclose(as_float32(bits, "bfloat16"), numbers, rtol=2**-7)
    np.testing.assert_array_equal(as_float32(bits, "bfloat16")[0, :3], numbers[0, :3])
    half = np.array([[0.5, -7.0]], np.float16)
    np.testing.assert_array_equal(as_float32(half, "float16"), half.astype(np.float32))


def test_which_interface_is_taken(
    folder: Path, acl: FakeAcl, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ais_bench", "ais_bench.infer", "ais_bench.infer.interface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["ais_bench.infer.interface"].InferSession = object  # type: ignore[attr-defined]
    loaded = ModelFolder.load(folder)
    assert _device(open_om_backend(loaded)) == "AclDevice"
    assert _device(open_om_backend(loaded, interface="pyacl")) == "AclDevice"
    assert _device(open_om_backend(loaded, interface="ais_bench")) == "AisBenchDevice"
    monkeypatch.setitem(sys.modules, "acl", ModuleType("acl"))  # some other module of that name
    assert _device(open_om_backend(loaded)) == "AisBenchDevice"
    with pytest.raises(MissingPackageError, match=r"needs pyACL, .*acl at \? is not CANN's"):
        open_om_backend(loaded, interface="pyacl")
    gc.collect()


def test_without_either_it_says_what_to_get(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(om.importlib, "import_module", missing)
    with pytest.raises(MissingPackageError, match=r"needs pyACL or ais_bench.*CANN's toolkit"):
        TriangleSession.from_folder(folder, provider="npu")


def _device(backend: StaticBackend) -> str:
    if isinstance(backend.device, AclDevice):
        assert backend.provider == "npu"
    return type(backend.device).__name__
