"""CANN's pyACL as far as offline models need it: whatever it hands out is owned here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray
from trianglemix.runtime.errors import ExecutionError

_HUGE_PAGES_FIRST: Final = 0
_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3
_ALREADY_INITIALIZED: Final = 100002
_SUCCESS: Final = 0


@dataclass(frozen=True)
class AclModel:
    """A loaded offline model: its number, and the bytes of its inputs and outputs in order."""

    number: int
    input_bytes: tuple[int, ...]
    output_bytes: tuple[int, ...]


class AclRuntime:
    """One device. Addresses, datasets and models live until released, at the latest at `close`.

    Every method raises ExecutionError with the function's name and pyACL's number if a call fails.
    """

    def __init__(self, acl: Any, device_id: int) -> None:
        self._acl, self._device_id = acl, device_id
        self._addresses: set[int] = set()
        self._datasets: dict[Any, list[Any]] = {}
        self._models: dict[int, Any] = {}
        self._is_open = False
        code = acl.init()
        self._finalizes = code != _ALREADY_INITIALIZED  # another user of CANN in this process
        if self._finalizes:
            self._check("acl.init", code)
        try:
            self._check("acl.rt.set_device", acl.rt.set_device(device_id))
            self._context = self._result("acl.rt.create_context", acl.rt.create_context(device_id))
            self._stream = self._result("acl.rt.create_stream", acl.rt.create_stream())
        except ExecutionError:
            if self._finalizes:
                acl.finalize()
            raise
        self._is_open = True

    def bind_thread(self) -> None:
        """Makes the device current in the calling thread, as pyACL wants it in each."""
        self._check("acl.rt.set_context", self._acl.rt.set_context(self._context))

    def allocate(self, size: int) -> int:
        """Address of `size` bytes of device memory, filled with zeros."""
        address = int(
            self._result("acl.rt.malloc", self._acl.rt.malloc(size, _HUGE_PAGES_FIRST), f"{size} B")
        )
        self._addresses.add(address)
        self._check("acl.rt.memset", self._acl.rt.memset(address, size, 0, size))
        return address

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copies a contiguous host array to the device."""
        size, host = array.nbytes, array.ctypes.data
        code = self._acl.rt.memcpy(address, size, host, size, _HOST_TO_DEVICE)
        self._check("acl.rt.memcpy to the device", code)

    def download(self, array: NDArray[Any], address: int) -> None:
        """Fills a contiguous host array from the device."""
        size, host = array.nbytes, array.ctypes.data
        code = self._acl.rt.memcpy(host, size, address, size, _DEVICE_TO_HOST)
        self._check("acl.rt.memcpy to the host", code)

    def move(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copies `(to, from, bytes)` on the device; all are done when it returns."""
        for target, source, size in copies:
            code = self._acl.rt.memcpy_async(
                target, size, source, size, _DEVICE_TO_DEVICE, self._stream
            )
            self._check("acl.rt.memcpy_async", code)
        self._check("acl.rt.synchronize_stream", self._acl.rt.synchronize_stream(self._stream))

    def load(self, path: Path) -> AclModel:
        """Loads an offline model and reads its description."""
        mdl = self._acl.mdl
        number = int(
            self._result("acl.mdl.load_from_file", mdl.load_from_file(str(path)), str(path))
        )
        description = self._models[number] = mdl.create_desc()
        self._check("acl.mdl.get_desc", mdl.get_desc(description, number))
        return AclModel(
            number,
            tuple(
                int(mdl.get_input_size_by_index(description, index))
                for index in range(mdl.get_num_inputs(description))
            ),
            tuple(
                int(mdl.get_output_size_by_index(description, index))
                for index in range(mdl.get_num_outputs(description))
            ),
        )

    def make_dataset(self, tensors: Sequence[tuple[int, int]]) -> Any:
        """Addresses and sizes of a model's inputs, or of its outputs, for `execute`."""
        dataset = self._acl.mdl.create_dataset()
        buffers = self._datasets[dataset] = []
        for address, size in tensors:
            buffers.append(self._acl.create_data_buffer(address, size))
            answer = self._acl.mdl.add_dataset_buffer(dataset, buffers[-1])
            self._result("acl.mdl.add_dataset_buffer", answer)
        return dataset

    def execute(self, model: AclModel, inputs: Any, outputs: Any) -> None:
        """Runs the model and waits for it."""
        self._check("acl.mdl.execute", self._acl.mdl.execute(model.number, inputs, outputs))

    def release(self, addresses: Sequence[int], datasets: Sequence[Any]) -> None:
        """Gives back what is still held; after `close` there is nothing left to do."""
        if not self._is_open:
            return
        self._acl.rt.set_context(self._context)
        for dataset in datasets:
            for buffer in self._datasets.pop(dataset, ()):
                self._acl.destroy_data_buffer(buffer)
            self._acl.mdl.destroy_dataset(dataset)
        for address in set(addresses) & self._addresses:
            self._addresses.discard(address)
            self._acl.rt.free(address)

    def close(self) -> None:
        """Gives everything back, the device last."""
        self.release(list(self._addresses), list(self._datasets))
        self._is_open = False
        for number, description in self._models.items():
            self._acl.mdl.unload(number)
            self._acl.mdl.destroy_desc(description)
        self._models.clear()
        self._acl.rt.destroy_stream(self._stream)
        self._acl.rt.destroy_context(self._context)
        if self._finalizes:
            self._acl.rt.reset_device(self._device_id)
            self._acl.finalize()

    def _result(self, what: str, answer: tuple[Any, int], detail: str = "") -> Any:
        """The first part of pyACL's `(value, code)`."""
        value, code = answer
        self._check(what, code, detail)
        return value

    def _check(self, what: str, code: int, detail: str = "") -> None:
        if code != _SUCCESS:
            explain = getattr(self._acl, "get_recent_err_msg", None)
            words = " ".join(str(explain() or "").split()) if explain is not None else ""
            detail = f" ({detail})" if detail else ""
            raise ExecutionError(
                f"{what}{detail} failed with {code}{': ' if words else ''}{words}; CANN's error "
                "list (hiascend.com) and its log (~/ascend/log) say more"
            )
