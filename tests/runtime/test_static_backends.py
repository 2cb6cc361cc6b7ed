"""Folders of static graphs: which runtime takes them, and offline models through ais_bench."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from trianglemix.manifest.feeds import Call
from trianglemix.manifest.manifest import Manifest
from trianglemix.runtime.errors import (
    ExecutionError,
    FolderError,
    MissingPackageError,
    ProviderError,
)
from trianglemix.runtime.session import TriangleSession

from tests.exporter.targets.ascend.exported import Pair, export_pair, prompt, tiny_source


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return export_pair(tiny_source("qwen2"), tmp_path_factory.mktemp("static"))


class InferSession:
    """Stands for ais_bench's class: runs the ONNX file that the offline model was made of."""

    broken = False

    def __init__(self, device_id: int, model_path: str) -> None:
        assert device_id == 0
        assert Path(model_path).read_text() == "om"
        path = Path(model_path).with_suffix(".onnx")
        self._session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])

    def infer(self, feeds: list[NDArray], mode: str) -> list[NDArray]:
        assert mode == "static"
        assert all(array.flags["C_CONTIGUOUS"] for array in feeds)
        if InferSession.broken:
            raise RuntimeError("aclmdlExecute failed,\n ret 507011")
        names = [value.name for value in self._session.get_inputs()]
        outputs = self._session.run(None, dict(zip(names, feeds, strict=True)))
        return [array.reshape(-1) for array in outputs]  # shapes are the manifest's business


@pytest.fixture
def ais_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ais_bench", "ais_bench.infer", "ais_bench.infer.interface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["ais_bench.infer.interface"].InferSession = InferSession  # type: ignore[attr-defined]
    monkeypatch.setattr(InferSession, "broken", False)


def _make_offline_models(folder: Path) -> None:
    for file in folder.glob("*.onnx"):
        file.with_suffix(".om").write_text("om")


@pytest.mark.usefixtures("ais_bench")
def test_offline_models_give_the_tokens_of_the_graphs(pair: Pair) -> None:
    _make_offline_models(pair.ascend)
    npu = TriangleSession.from_folder(pair.ascend, provider="npu")
    cpu = TriangleSession.from_folder(pair.ascend, provider="cpu")
    for length in (3, 16, 49, 120):
        assert npu.generate(prompt(length), 5).ids == cpu.generate(prompt(length), 5).ids
    assert (npu.provider, npu.kernel, cpu.provider) == ("npu", "static", "cpu")


@pytest.mark.usefixtures("ais_bench")
def test_a_failing_device_says_why_in_one_line(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    _make_offline_models(pair.ascend)
    npu = TriangleSession.from_folder(pair.ascend, provider="npu")
    monkeypatch.setattr(InferSession, "broken", True)
    with pytest.raises(ExecutionError, match=r"tail\.om failed to run: aclmdlExecute failed, ret"):
        npu.generate(prompt(5), 2)


@pytest.mark.usefixtures("ais_bench")
def test_missing_offline_model_names_the_script(pair: Pair) -> None:
    for file in pair.ascend.glob("*.om"):
        file.unlink()
    npu = TriangleSession.from_folder(pair.ascend, provider="npu")
    with pytest.raises(FolderError, match=r"tail\.om is missing; run build_om\.sh"):
        npu.generate(prompt(5), 2)


def test_without_cann_it_says_what_to_get(pair: Pair) -> None:
    if "ais_bench" in sys.modules or "acl" in sys.modules:
        pytest.skip("ais_bench or pyACL is installed here")
    wanted = r"npu needs pyACL or ais_bench.*CANN's toolkit"
    with pytest.raises(MissingPackageError, match=wanted):
        TriangleSession.from_folder(pair.ascend, provider="npu")


def test_providers_that_do_not_fit(pair: Pair) -> None:
    with pytest.raises(ProviderError, match="exported with --target ascend"):
        TriangleSession.from_folder(pair.cpu, provider="npu")
    with pytest.raises(ProviderError, match="runs on cpu or npu"):
        TriangleSession.from_folder(pair.ascend, provider="cuda")


def test_manifest_keeps_its_static_section(pair: Pair, tmp_path: Path) -> None:
    manifest = Manifest.load(pair.ascend)
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert Manifest.load(pair.cpu).static is None


def test_a_dead_slot_never_reaches_an_answer(pair: Pair) -> None:
    """A cache that held a longer text gives, after a fresh start, what a new one gives."""
    session = TriangleSession.from_folder(pair.ascend)
    cache = session.backend.open_cache(1, 256)
    long = Call(np.array([prompt(200)]), np.ones((1, 200), np.int64), prompt_end=200)
    cache.step(long, True)
    short = Call(np.array([prompt(40, seed=3)]), np.ones((1, 40), np.int64), prompt_end=40)
    used = cache.step(short, True)
    fresh = session.backend.open_cache(1, 256).step(short, True)
    assert used is not None
    assert fresh is not None
    np.testing.assert_array_equal(used, fresh)
