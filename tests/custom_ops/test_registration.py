"""What `RegisterCustomOps` tells an ONNX Runtime, seen through tables of our own making.

Two ONNX Runtimes may live in one process, and one may be too old: neither can be had with a
package, so a table of C function pointers stands for each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, ClassVar

from trianglemix.custom_ops import contract
from trianglemix.custom_ops.library import library_path

API_VERSION = 18
CREATE_STATUS, CREATE_DOMAIN, ADD_OP, ADD_DOMAIN = 0, 26, 27, 28
POINTER = ctypes.c_void_p


class Base(ctypes.Structure):
    """OrtApiBase."""

    _fields_ = [("get_api", POINTER), ("get_version", POINTER)]


class StandInRuntime:
    """Counts what the library does to it. A domain is a number, as is a SessionOptions."""

    never_freed: ClassVar[list[StandInRuntime]] = []  # the library knows a runtime by its address

    def __init__(self, version: bytes, newest_api: int, first_domain: int) -> None:
        self.never_freed.append(self)
        self.errors: list[bytes] = []
        self.domains: list[bytes] = []
        self.ops: list[int] = []
        self.sessions: list[tuple[int, int]] = []
        self._first_domain, self._alive = first_domain, list[Any]()
        self._table = (POINTER * 300)()
        status_of = ctypes.CFUNCTYPE(POINTER, ctypes.c_int, ctypes.c_char_p)
        self._slot(CREATE_STATUS, status_of, self._create_status)
        domain_of = ctypes.CFUNCTYPE(POINTER, ctypes.c_char_p, ctypes.POINTER(POINTER))
        self._slot(CREATE_DOMAIN, domain_of, self._create_domain)
        two_pointers = ctypes.CFUNCTYPE(POINTER, POINTER, POINTER)
        self._slot(ADD_OP, two_pointers, self._add_op)
        self._slot(ADD_DOMAIN, two_pointers, self._add_domain)
        table = ctypes.addressof(self._table)
        get_api = ctypes.CFUNCTYPE(POINTER, ctypes.c_uint32)(
            lambda wanted: table if wanted <= newest_api else None
        )
        text = ctypes.create_string_buffer(version)
        get_version = ctypes.CFUNCTYPE(POINTER)(lambda: ctypes.addressof(text))
        self._alive += [get_api, get_version]
        self.base = Base(ctypes.cast(get_api, POINTER), ctypes.cast(get_version, POINTER))

    def register(self, session_options: int) -> int | None:
        """Calls RegisterCustomOps; None is success."""
        entry = ctypes.CDLL(str(library_path())).RegisterCustomOps
        entry.restype, entry.argtypes = POINTER, [POINTER, POINTER]
        status: int | None = entry(session_options, ctypes.addressof(self.base))
        return status

    def _slot(self, slot: int, signature: Any, function: Callable[..., Any]) -> None:
        callback = signature(function)
        self._alive.append(callback)
        self._table[slot] = ctypes.cast(callback, POINTER).value

    def _create_status(self, _code: int, message: bytes) -> int:
        self.errors.append(message)
        return 1

    def _create_domain(self, name: bytes, out: Any) -> None:
        self.domains.append(name)
        out[0] = self._first_domain + len(self.domains)

    def _add_op(self, domain: int, _op: int) -> None:
        self.ops.append(domain)

    def _add_domain(self, options: int, domain: int) -> None:
        self.sessions.append((options, domain))


def test_each_runtime_gets_one_domain_of_its_own() -> None:
    runtimes = [StandInRuntime(b"1.31.1", 31, 100), StandInRuntime(b"1.20.1", 20, 200)]
    for options in (7, 8):
        for runtime in runtimes:
            assert runtime.register(options) is None
    for runtime, domain in zip(runtimes, (101, 201), strict=True):
        assert runtime.domains == [contract.DOMAIN.encode()]
        assert runtime.sessions == [(7, domain), (8, domain)]
        assert set(runtime.ops) == {domain}
        assert len(runtime.ops) % 3 == 0  # float32, float16 and bfloat16 for each provider
        assert not runtime.errors


def test_the_lowest_version_with_every_slot_is_enough() -> None:
    assert StandInRuntime(b"1.18.0", API_VERSION, 300).register(1) is None


def test_an_older_runtime_is_refused_with_its_version() -> None:
    runtime = StandInRuntime(b"1.17.3", API_VERSION - 1, 400)
    assert runtime.register(1) is not None
    assert runtime.errors == [
        b"the trianglemix operators need ONNX Runtime 1.20 or later, this is 1.17.3; "
        b"install a newer one"
    ]
    assert not runtime.domains
