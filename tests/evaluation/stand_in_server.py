"""An OpenAI endpoint in a thread: streams the greedy answers of a tiny model, as vLLM does."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, cast

from trianglemix.evaluation.huggingface import HuggingFaceModel

_NOT_FOUND: Final = "The model `{}` does not exist."


@dataclass
class StandIn:
    """What it serves, how it behaves, and what it was asked."""

    model: HuggingFaceModel
    root: str
    name: str = "tiny"
    context: int = 2048
    owner: str = "vllm"
    models: tuple[str, ...] | None = ("tiny",)
    key: str | None = None
    has_metrics: bool = True
    takes_ids: bool = True
    added_tokens: int = 0
    seconds_before_first: float = 0.0
    seconds_after_first: float = 0.0
    breaks_after: int = 10**6
    """Requests after which a stream breaks off, by `how_it_breaks`."""
    how_it_breaks: str = "close"
    asked: list[dict[str, Any]] = field(default_factory=list)
    address: str = ""

    def metrics(self) -> str:
        """As our plug-in counts; without triangle layers vLLM's own lines alone."""
        layers = self.model.facts["triangle_layers"]
        lines = ['vllm:num_requests_running{engine="0"} 0.0']
        for layer in layers:
            for kind, rows in (("dense", 40), ("triangle", 600)):
                name = "vllm:trianglemix_rows_total"
                lines.append(f'{name}{{kind="{kind}",layer="{layer}"}} {rows}.0')
        return "\n".join(lines) + "\n"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def _stand_in(self) -> StandIn:
        return cast(_Server, self.server).stand_in

    def do_GET(self) -> None:
        served = self._stand_in
        if self.path == "/metrics" and served.has_metrics:
            self._reply(200, served.metrics(), "text/plain")
        elif self.path == "/v1/models" and served.models is not None:
            entries = [
                {"id": name, "object": "model", "owned_by": served.owner, "root": served.root,
                 "max_model_len": served.context}
                for name in served.models
            ]  # fmt: skip
            self._reply(200, json.dumps({"object": "list", "data": entries}))
        else:
            self._reply(404, json.dumps({"detail": "Not Found"}))

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        served = self._stand_in
        served.asked.append(asked | {"authorization": self.headers["Authorization"]})
        if served.key and self.headers["Authorization"] != f"Bearer {served.key}":
            self._refuse(401, "Unauthorized")
        elif asked["model"] != served.name:
            self._refuse(404, _NOT_FOUND.format(asked["model"]))
        elif not served.takes_ids:
            self._refuse(400, "prompt: Input should be a valid string")
        elif len(asked["prompt"]) + asked["max_tokens"] > served.context:
            self._refuse(400, f"This model's maximum context length is {served.context} tokens.")
        else:
            self._stream(asked)

    def _stream(self, asked: dict[str, Any]) -> None:
        served, ids = self._stand_in, tuple(asked["prompt"])
        tokens, _ = served.model.greedy_tokens(ids, asked["max_tokens"])
        text = served.model.tokenizer.decode(tokens)
        if served.owner == "vllm":  # whose text lacks a last character that is not whole
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        time.sleep(served.seconds_before_first)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(max(len(text), len(tokens))):
            choice: dict[str, Any] = {"index": 0, "text": text[number : number + 1]}
            if asked.get("return_token_ids"):
                choice["token_ids"] = tokens[number : number + 1]
            self._event({"choices": [choice]})
            if number == 0:
                time.sleep(served.seconds_after_first)
                if len(served.asked) > served.breaks_after:
                    self._break_off()
                    return
        self._event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        if (asked.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": len(ids) + served.added_tokens}
            self._event({"choices": [], "usage": usage})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _break_off(self) -> None:
        how = self._stand_in.how_it_breaks
        if how == "error":
            self._event({"error": {"message": "EngineCore died", "code": 500}})
            self._chunk(b"")
        elif how == "nonsense":
            self._chunk(b"data: {broken\n\n")
            self._chunk(b"")
        else:
            self.close_connection = True

    def _event(self, content: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(content).encode() + b"\n\n")

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
        self.wfile.flush()

    def _refuse(self, status: int, message: str) -> None:
        self._reply(status, json.dumps({"error": {"message": message, "code": status}}))

    def _reply(self, status: int, text: str, kind: str = "application/json") -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    stand_in: StandIn

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no fault of the server."""


@contextmanager
def serving(stand_in: StandIn) -> Iterator[StandIn]:
    """Serves it on a free port; `address` is its base URL."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.stand_in = stand_in
        stand_in.address = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield stand_in
        finally:
            server.shutdown()
            thread.join()
