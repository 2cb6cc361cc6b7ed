"""A chat as text: a Jinja template filled in as transformers' `apply_chat_template` does it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, NoReturn

import jinja2
import numpy as np
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from trianglemix.runtime.errors import PromptError

Message = Mapping[str, object]

_MOST_CHARACTERS: Final = 1 << 26  # no context holds more
_TAG: Final = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")
_FAILURES: Final = (
    jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError,
    RecursionError, MemoryError,
)  # fmt: skip # what a template's own code can raise


@dataclass(frozen=True)
class ChatOptions:
    """What a chat is filled in with besides its messages.

    `tools` and `documents` are JSON objects, `variables` what this template knows by name
    (`enable_thinking`); `continue_final_message` leaves the last message open.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: Sequence[Mapping[str, object]] | None = None
    documents: Sequence[Mapping[str, object]] | None = None
    variables: Mapping[str, object] = field(default_factory=dict)


def render_chat(
    source: str,
    messages: Sequence[Message],
    options: ChatOptions,
    special_tokens: Mapping[str, str],
) -> str:
    """The text of `messages` in the template `source`; special tokens are its variables.

    Raises:
        PromptError: no messages, or the template refuses them or fails on them.
    """
    chat = _prepare(messages, options)
    final = _mark_final(chat, source) if options.continue_final_message else None
    values = {
        "messages": chat,
        "tools": _plain(options.tools),
        "documents": _plain(options.documents),
        "add_generation_prompt": options.add_generation_prompt,
        **special_tokens,
        **_plain(options.variables),
    }
    try:
        text = _bounded(_compile(source), values)
    except _FAILURES as error:
        verb = "refuses" if isinstance(error, jinja2.TemplateError) else "fails on"
        reason = str(error) or type(error).__name__
        raise PromptError(f"the model's chat template {verb} this prompt: {reason}") from error
    return text if final is None else _cut_after(text, final)


def _prepare(messages: Sequence[Message], options: ChatOptions) -> list[dict[str, Any]]:
    """The messages in plain JSON, keys without a value left out, reasoning under each name."""
    if not messages:
        raise PromptError("the chat has no messages; give at least one")
    if options.continue_final_message and options.add_generation_prompt:
        raise PromptError(
            "continue_final_message goes on with the last message, add_generation_prompt begins "
            "a new one; choose one of them"
        )
    chat = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise PromptError(f"a chat's message is an object of role and content, not {message!r}")
        plain = {name: _plain(value) for name, value in message.items() if value is not None}
        thought = next((plain[name] for name in _REASONING if plain.get(name) is not None), None)
        if thought is not None:
            plain = {"thinking": thought, **plain, "reasoning_content": thought}
        chat.append(plain)
    return chat


def _plain(value: object) -> Any:
    """JSON types as they are; anything else by the name of its type, since templates ask only
    whether it is there, and must not reach its methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _bounded(template: jinja2.Template, values: Mapping[str, Any]) -> str:
    pieces, size = [], 0
    for piece in template.generate(values):
        size += len(piece)
        if size > _MOST_CHARACTERS:
            raise jinja2.TemplateError(f"it writes more than {_MOST_CHARACTERS} characters")
        pieces.append(piece)
    return "".join(pieces)


def _mark_final(chat: list[dict[str, Any]], source: str) -> str:
    """Puts a mark behind the last message's text; returns that text."""
    if "content" not in source:
        raise PromptError("the chat template names no content, so no message can be continued")
    content = chat[-1].get("content")
    if isinstance(content, str):
        chat[-1]["content"] = content + _TAG
        return content
    for part in reversed(content if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text: str = part["text"]
            part["text"] = text + _TAG
            return text
    raise PromptError("the last message holds no text that could be continued")


def _cut_after(text: str, final: str) -> str:
    """The chat up to the mark; without the spaces before it where the template strips them."""
    if final.strip() not in text or _TAG.strip() not in text:
        raise PromptError(
            "the chat template leaves out a part of the last message, which can then not be "
            "continued"
        )
    end = text.rindex(_TAG.strip())
    return text[:end] if text[end : end + len(_TAG)] == _TAG else text[:end].rstrip()


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_refuse,
        strftime_now=lambda form: datetime.now().strftime(form),
        dict=_Dict(),
        namespace=_Namespace,
    )
    return environment.from_string(source)


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here they are just text."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter it keeps the order of keys, and escapes nothing for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


class _Dict:
    """`dict` without the type's own attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """A template's variables; none begins with an underscore, which might reach Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `self` may be a variable
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no variable named {name}")
