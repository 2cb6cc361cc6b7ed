"""An OpenAI endpoint over HTTP: its models, and greedy completions of token ids as they come."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from trianglemix.custom_ops.errors import TriangleMixError, first_words
from trianglemix.runtime.errors import MissingPackageError

try:
    import requests
except ImportError as error:
    raise MissingPackageError(
        f"a served model is asked with the package requests, which cannot be imported ({error}); "
        "pip install 'trianglemix[served]'"
    ) from error

API_KEY: Final = "OPENAI_API_KEY"
_CONNECT_SECONDS: Final = 10.0
_LONGEST: Final = 300
_ROWS: Final = re.compile(
    r'^vllm:trianglemix_rows_total\{kind="(\w+)",layer="(\d+)"\} (\S+)$', re.MULTILINE
)


class ServerError(TriangleMixError):
    """A server that is not there, or does not answer as it was asked to."""


@dataclass(frozen=True)
class ModelCard:
    """What an endpoint says of a model; None where it does not."""

    name: str
    root: str | None
    context: int | None
    is_vllm: bool


@dataclass(frozen=True)
class Completion:
    """An answer, the tokens of its prompt as the server counts them, seconds to the first token.

    `tokens` are those of the answer where the server was asked for them and tells them.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int | None
    ttft_s: float


class Endpoint:
    """`base_url` is the part before `/completions`, such as `http://localhost:8000/v1`.

    The key of `OPENAI_API_KEY`, where that is set, goes with every request. `timeout` is in
    seconds, of silence.
    """

    def __init__(self, base_url: str, timeout: float) -> None:
        self.base_url = base_url.rstrip("/")
        self._timeout = timeout
        self._session = requests.Session()
        if key := os.environ.get(API_KEY):
            self._session.auth = _Bearer(key)

    def models(self) -> list[ModelCard] | None:
        """The models that it serves; None where it has no list of them.

        Raises:
            ServerError: there is no such server, or it refuses.
        """
        with self._asked("GET", f"{self.base_url}/models") as reply:
            if reply.status_code in (404, 405):
                return None
            self._check(reply)
            try:
                return [_card(entry) for entry in reply.json()["data"]]
            except (ValueError, KeyError, TypeError) as error:
                raise ServerError(
                    f"{self.base_url}/models is no list of models; give the base URL of an OpenAI "
                    "endpoint, such as http://localhost:8000/v1"
                ) from error

    def complete(
        self,
        model: str,
        ids: tuple[int, ...],
        max_new_tokens: int,
        more: Mapping[str, Any] | None = None,
    ) -> Completion:
        """The greedy answer to a prompt of token ids; `more` are fields of the request.

        Raises:
            ServerError: no answer, or a refusal, with the server's own words.
        """
        asked: dict[str, Any] = {
            "model": model, "prompt": list(ids), "max_tokens": max_new_tokens, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True}, **(more or {}),
        }  # fmt: skip
        body = json.dumps(asked).encode()
        started, first = time.perf_counter(), None
        parts, tokens, counted = list[str](), list[int](), None
        with self._asked("POST", f"{self.base_url}/completions", body) as reply:
            self._check(reply)
            for event in self._events(reply):
                if event.get("choices"):
                    first = time.perf_counter() if first is None else first
                    choice = event["choices"][0]
                    parts.append(choice.get("text") or "")
                    tokens += choice.get("token_ids") or ()
                counted = (event.get("usage") or {}).get("prompt_tokens", counted)
        if first is None:
            raise ServerError(f"{self.base_url} ended its answer before the first token")
        return Completion("".join(parts), tuple(tokens), counted, first - started)

    def layers_by_kind(self) -> dict[str, list[int]] | None:
        """Layers in which our plug-in dropped keys so far, by vLLM's metrics; None without any.

        Kinds are `triangle` and `block_sparse`.
        """
        try:
            reply = self._session.get(
                f"{self.base_url.removesuffix('/v1')}/metrics", timeout=_CONNECT_SECONDS
            )
        except requests.RequestException:
            return None
        if reply.status_code != 200 or "vllm:" not in reply.text:
            return None
        found: dict[str, list[int]] = {"triangle": [], "block_sparse": []}
        for kind, layer, rows in _ROWS.findall(reply.text):
            if kind in found and float(rows) > 0:
                found[kind].append(int(layer))
        return {kind: sorted(layers) for kind, layers in found.items()}

    @contextmanager
    def _asked(self, method: str, url: str, body: bytes | None = None) -> Iterator[Any]:
        """A reply whose body is still to come; what goes wrong until it is read is one line."""
        limits, kind = (_CONNECT_SECONDS, self._timeout), {"Content-Type": "application/json"}
        try:
            with self._session.request(
                method, url, data=body, headers=kind, timeout=limits, stream=True
            ) as reply:
                yield reply
        except requests.Timeout as error:
            raise ServerError(
                f"{self.base_url} said nothing for {self._timeout:g} s; is it busy? Give a longer "
                "--timeout, or fewer --tokens"
            ) from error
        except requests.exceptions.InvalidURL as error:
            raise ServerError(f"{self.base_url} is no address: {first_words(error)}") from error
        except requests.ConnectionError as error:
            if "timed out" in str(error).lower():  # requests takes a slow stream for a broken one
                raise ServerError(
                    f"{self.base_url} said nothing for {self._timeout:g} s; is it busy? Give a "
                    "longer --timeout, or fewer --tokens"
                ) from error
            raise ServerError(
                f"no server answers at {self.base_url} ({_cause(error)}); is it running?"
            ) from error
        except requests.RequestException as error:
            raise ServerError(f"{self.base_url} broke off: {first_words(error)}") from error

    def _check(self, reply: Any) -> None:
        if reply.status_code in (401, 403):
            raise ServerError(
                f"{self.base_url} refuses the key ({reply.status_code}: {_words(reply)}); set "
                f"{API_KEY}"
            )
        if reply.status_code == 404:
            raise ServerError(
                f"{self.base_url} answers 404: {_words(reply)}; is the address its base URL, such "
                "as http://localhost:8000/v1, and the model one of its own?"
            )
        if reply.status_code != 200:
            raise ServerError(f"{self.base_url} answers {reply.status_code}: {_words(reply)}")

    def _events(self, reply: Any) -> Iterator[dict[str, Any]]:
        """The server-sent events of a stream, until `[DONE]`."""
        for line in reply.iter_lines(chunk_size=1):  # larger pieces would be waited for
            content = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or content == b"[DONE]":
                continue
            try:
                event = json.loads(content)
            except ValueError:
                event = None
            if not isinstance(event, dict):
                raise ServerError(f"{self.base_url} sends what is no event: {content[:80]!r}")
            if "error" in event:
                raise ServerError(f"{self.base_url} broke off: {_message(event)}")
            yield event


class _Bearer(requests.auth.AuthBase):
    """The key of the endpoint; a header alone would give way to a netrc file's."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, request: Any) -> Any:
        request.headers["Authorization"] = f"Bearer {self._key}"
        return request


def _card(entry: Mapping[str, Any]) -> ModelCard:
    context = entry.get("max_model_len")
    return ModelCard(
        str(entry["id"]),
        entry.get("root"),
        int(context) if context else None,
        entry.get("owned_by") == "vllm",
    )


def _words(reply: Any) -> str:
    """The server's own words of why it refuses."""
    try:
        content = json.loads(reply.content)
    except ValueError:
        content = None
    return _message(content) if isinstance(content, dict) else reply.text[:_LONGEST].strip()


def _message(content: Mapping[str, Any]) -> str:
    error = content.get("error", content)
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return " ".join(str(error).split())[:_LONGEST]


def _cause(error: Exception) -> str:
    """`Connection refused` out of the wrappings of three packages."""
    found = re.findall(r"\[Errno -?\d+\] ([^'\")>]+)", str(error))
    return found[-1].strip() if found else first_words(error)[:80]
