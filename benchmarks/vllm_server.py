"""vLLM's OpenAI server in a process of its own, for benchmarks and tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Self

_LOG_END: Final = 4000
_STOP_SECONDS: Final = 60


class Server:
    """Starts when the block is entered, beside us, and ends with it; `address` waits for it.

    `options` are those of `vllm.entrypoints.openai.api_server` (None: a flag); `log` is a file.
    """

    def __init__(
        self,
        python: Path | str,
        options: Mapping[str, str | None],
        environment: Mapping[str, str],
        log: Path,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        given = {**options, "host": "127.0.0.1", "port": str(self._port)}
        parts = (part for name, value in given.items() for part in (f"--{name}", value))
        module = ["-m", "vllm.entrypoints.openai.api_server"]
        self._command = [str(python), *module, *(part for part in parts if part is not None)]
        self._environment = {**os.environ, **environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=self._environment,
                cwd=self._log.parent, start_new_session=True,
            )  # fmt: skip
        return self

    def address(self, seconds: float) -> str:
        """`http://127.0.0.1:PORT`, once it answers; RuntimeError with the log's end if it fails."""
        assert self._process is not None
        address, deadline = f"http://127.0.0.1:{self._port}", time.monotonic() + seconds
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=2):
                    return address
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(self.log()[-_LOG_END:])

    def log(self) -> str:
        """What it has written so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
