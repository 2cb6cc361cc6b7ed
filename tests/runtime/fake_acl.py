"""Stands for CANN's module `acl`: device memory that is counted, models that run on ONNX Runtime.

Device memory is host memory at addresses of its own; every copy is checked to stay inside one
live allocation and to have the kind that it says. Offline models are files that hold "om", beside
the ONNX file that they were made of.
"""

from __future__ import annotations

import ctypes
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort
from trianglemix.custom_ops.library import library_path

_BY_ORT = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32,
           "tensor(float16)": np.float16}  # fmt: skip


class FakeAcl:
    """The state of the device; `module` is what `import acl` gives."""

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.models: dict[int, ort.InferenceSession] = {}
        self.datasets: dict[int, list[int]] = {}
        self.buffers: dict[int, tuple[int, int]] = {}
        self.contexts: set[int] = set()
        self.descriptions: dict[int, int] = {}
        self.streams: set[int] = set()
        self.calls: list[str] = []
        self.bytes_to_device = self.bytes_to_host = 0
        self.fail: dict[str, int] = {}
        self.initialized = False
        self.pending: list[tuple[int, int, int]] = []
        self._handles = count(1000)
        self.module = self._module()

    @property
    def leaks(self) -> dict[str, int]:
        """What is still held, by kind; empty if everything was given back."""
        held = {
            "memory": len(self.memory),
            "models": len(self.models),
            "datasets": len(self.datasets),
            "buffers": len(self.buffers),
            "contexts": len(self.contexts),
            "descriptions": len(self.descriptions),
            "streams": len(self.streams),
            "initialized": int(self.initialized),
        }
        return {kind: number for kind, number in held.items() if number}

    def _module(self) -> ModuleType:
        acl, rt, mdl = (ModuleType(name) for name in ("acl", "acl.rt", "acl.mdl"))
        for module, prefix in ((acl, "acl_"), (rt, "rt_"), (mdl, "mdl_")):
            for name in dir(type(self)):
                if name.startswith(prefix):
                    setattr(module, name.removeprefix(prefix), self._recorded(name))
        acl.rt, acl.mdl = rt, mdl  # type: ignore[attr-defined]
        return acl

    def _recorded(self, name: str) -> Any:
        method = getattr(self, name)

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            if name in self.fail:
                code = self.fail[name]
                return (None, code) if name in ("rt_malloc", "mdl_load_from_file") else code
            return method(*arguments)

        return call

    # acl

    def acl_init(self) -> int:
        assert not self.initialized
        self.initialized = True
        return 0

    def acl_finalize(self) -> int:
        assert self.initialized
        self.initialized = False
        return 0

    def acl_create_data_buffer(self, address: int, size: int) -> int:
        self._inside(address, size)
        handle = next(self._handles)
        self.buffers[handle] = (address, size)
        return handle

    def acl_destroy_data_buffer(self, buffer: int) -> int:
        del self.buffers[buffer]
        return 0

    def acl_get_recent_err_msg(self) -> str:
        return "EZ9999: Inner Error!\n  of the stand-in"

    # acl.rt

    def rt_set_device(self, device: int) -> int:
        assert device == 0
        return 0

    def rt_reset_device(self, device: int) -> int:
        assert device == 0
        return 0

    def rt_create_context(self, device: int) -> tuple[int, int]:
        self.contexts.add(handle := next(self._handles))
        return handle, 0

    def rt_set_context(self, context: int) -> int:
        assert context in self.contexts
        return 0

    def rt_destroy_context(self, context: int) -> int:
        self.contexts.remove(context)
        return 0

    def rt_create_stream(self) -> tuple[int, int]:
        self.streams.add(handle := next(self._handles))
        return handle, 0

    def rt_destroy_stream(self, stream: int) -> int:
        self.streams.remove(stream)
        return 0

    def rt_malloc(self, size: int, policy: int) -> tuple[int, int]:
        assert size > 0
        block = (ctypes.c_uint8 * size)(*([171] * min(size, 64)))  # not zero, as on a device
        self.memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block), 0

    def rt_free(self, address: int) -> int:
        del self.memory[address]
        return 0

    def rt_memset(self, address: int, room: int, value: int, size: int) -> int:
        assert size <= room
        self._inside(address, room)
        ctypes.memset(address, value, size)
        return 0

    def rt_memcpy(self, target: int, room: int, source: int, size: int, kind: int) -> int:
        assert size <= room
        assert not self.pending, "a copy beside unfinished ones"
        if kind == 1:
            self._inside(target, size)
            self._outside(source)
            self.bytes_to_device += size
        else:
            assert kind == 2
            self._outside(target)
            self._inside(source, size)
            self.bytes_to_host += size
        ctypes.memmove(target, source, size)
        return 0

    def rt_memcpy_async(
        self, target: int, room: int, source: int, size: int, kind: int, stream: int
    ) -> int:
        assert kind == 3
        assert size <= room
        assert stream in self.streams
        self._inside(target, size)
        self._inside(source, size)
        self.pending.append((target, source, size))  # done at the latest when synchronized
        return 0

    def rt_synchronize_stream(self, stream: int) -> int:
        for target, source, size in self.pending:
            ctypes.memmove(target, source, size)
        self.pending.clear()
        return 0

    # acl.mdl

    def mdl_load_from_file(self, path: str) -> tuple[int, int]:
        assert Path(path).read_text() == "om"
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.register_custom_ops_library(str(library_path()))
        number = next(self._handles)
        self.models[number] = ort.InferenceSession(
            Path(path).with_suffix(".onnx"), options, providers=["CPUExecutionProvider"]
        )
        return number, 0

    def mdl_unload(self, number: int) -> int:
        del self.models[number]
        return 0

    def mdl_create_desc(self) -> int:
        self.descriptions[handle := next(self._handles)] = 0
        return handle

    def mdl_get_desc(self, description: int, number: int) -> int:
        self.descriptions[description] = number
        return 0

    def mdl_destroy_desc(self, description: int) -> int:
        del self.descriptions[description]
        return 0

    def mdl_get_num_inputs(self, description: int) -> int:
        return len(self._session(description).get_inputs())

    def mdl_get_num_outputs(self, description: int) -> int:
        return len(self._session(description).get_outputs())

    def mdl_get_input_size_by_index(self, description: int, index: int) -> int:
        return _bytes(self._session(description).get_inputs()[index]) + 24

    def mdl_get_output_size_by_index(self, description: int, index: int) -> int:
        return _bytes(self._session(description).get_outputs()[index]) + 32  # room, as CANN pads

    def mdl_create_dataset(self) -> int:
        self.datasets[handle := next(self._handles)] = []
        return handle

    def mdl_add_dataset_buffer(self, dataset: int, buffer: int) -> tuple[int, int]:
        self.datasets[dataset].append(buffer)
        return dataset, 0

    def mdl_destroy_dataset(self, dataset: int) -> int:
        del self.datasets[dataset]
        return 0

    def mdl_execute(self, number: int, inputs: int, outputs: int) -> int:
        assert not self.pending, "a model runs while its cache is being written"
        session = self.models[number]
        feeds = {}
        for value, buffer in zip(session.get_inputs(), self.datasets[inputs], strict=True):
            address, size = self.buffers[buffer]
            assert size == _bytes(value) + 24
            content = ctypes.string_at(address, _bytes(value))
            array = np.frombuffer(content, _BY_ORT[value.type]).reshape(value.shape)
            feeds[value.name] = array
        results = session.run(None, feeds)
        for array, buffer in zip(results, self.datasets[outputs], strict=True):
            address, size = self.buffers[buffer]
            assert size >= array.nbytes
            contiguous = np.ascontiguousarray(array)
            ctypes.memmove(address, contiguous.ctypes.data, array.nbytes)
        return 0

    def _session(self, description: int) -> ort.InferenceSession:
        return self.models[self.descriptions[description]]

    def _inside(self, address: int, size: int) -> None:
        spans = ((begin, begin + len(block)) for begin, block in self.memory.items())
        assert any(begin <= address and address + size <= end for begin, end in spans), (
            "device memory outside every live allocation"
        )

    def _outside(self, address: int) -> None:
        spans = ((begin, begin + len(block)) for begin, block in self.memory.items())
        assert not any(begin <= address < end for begin, end in spans), "host memory expected"


def _bytes(value: Any) -> int:
    return int(np.prod(value.shape)) * np.dtype(_BY_ORT[value.type]).itemsize
