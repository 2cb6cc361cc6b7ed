"""A chat becomes the text that transformers' `apply_chat_template` makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trianglemix.runtime.chat_files import _CLASS_TOKENS, ChatFiles
from trianglemix.runtime.chat_template import ChatOptions, render_chat
from trianglemix.runtime.errors import FolderError, PromptError
from trianglemix.runtime.tokenizer import Tokenizer

from tests.runtime.chat_templates import CHATS, DOCUMENTS, TEMPLATES, TOOLS

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
QUESTION = [{"role": "user", "content": "hi"}]
REFUSED = "refused"

OPTIONS = {
    "plain": ChatOptions(),
    "no answer asked for": ChatOptions(add_generation_prompt=False),
    "tools": ChatOptions(tools=TOOLS),
    "documents": ChatOptions(tools=TOOLS, documents=DOCUMENTS),
    "variables": ChatOptions(
        variables={"enable_thinking": False, "controls": {"a": "\u00fc"}, "image_token": "<img>"}
    ),
    "continued": ChatOptions(add_generation_prompt=False, continue_final_message=True),
}


def _theirs(source: str, messages: list[dict[str, Any]], options: ChatOptions) -> str:
    """What transformers makes of it, as its tokenizers call it; a refusal whatever its type."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, _ = render_jinja_template(
            conversations=[[{k: v for k, v in m.items() if v is not None} for m in messages]],
            tools=options.tools,
            documents=options.documents,
            chat_template=source,
            continue_final_message=options.continue_final_message,
            add_generation_prompt=options.add_generation_prompt,
            **{**TOKENS, **options.variables},
        )
    except Exception:
        return REFUSED
    return str(texts[0])


def _ours(source: str, messages: list[dict[str, Any]], options: ChatOptions) -> str:
    try:
        return render_chat(source, messages, options, TOKENS)
    except PromptError:
        return REFUSED


@pytest.mark.parametrize("template", TEMPLATES)
def test_same_text_as_transformers(template: str) -> None:
    source, texts = TEMPLATES[template], set()
    for chat, messages in CHATS.items():
        for kind, options in OPTIONS.items():
            theirs = _theirs(source, messages, options)
            assert _ours(source, messages, options) == theirs, f"{chat}, {kind}"
            texts.add(theirs)
    assert len(texts - {REFUSED}) > 3  # the comparison must not be of refusals alone


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no: ' + messages[0].content) }}",
        "{% for m in messages %}",
        "{{ messages[7].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ messages.__class__.__base__.__subclasses__() }}",
        "{% set ns = namespace(_x=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{% for i in range(1000000) %}{% endfor %}",
        "{{ unknown.attribute }}",
        "{{ messages[0].content | nosuchfilter }}",
        "{% include 'other' %}",
    ],
)
def test_both_refuse(source: str) -> None:
    assert _theirs(source, QUESTION, ChatOptions()) == REFUSED
    with pytest.raises(PromptError, match=r"the model's chat template (refuses|fails on)"):
        render_chat(source, QUESTION, ChatOptions(), TOKENS)


def test_the_output_is_bounded() -> None:
    source = "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}"
    with pytest.raises(PromptError, match="more than 67108864 characters"):
        render_chat(source, QUESTION, ChatOptions(), TOKENS)


def test_values_that_are_not_json() -> None:
    class Role(StrEnum):
        USER = "user"

    content = [
        {"type": "image", "image": np.zeros(2)},
        {"n": np.float32(0.5), "b": np.bool_(False)},
    ]
    messages = [{"role": Role.USER, "content": content, "t": (1, Path("x"))}]
    source = (
        "{{ messages }}{{ messages[0].role }}{% if not messages[0].content[1].b %}no{% endif %}"
    )
    text = render_chat(source, messages, ChatOptions(), TOKENS)
    assert text == _theirs(source, messages, ChatOptions())


def test_impossible_requests() -> None:
    with pytest.raises(PromptError, match="no messages"):
        render_chat("x", [], ChatOptions(), {})
    both = ChatOptions(continue_final_message=True)
    with pytest.raises(PromptError, match="choose one of them"):
        render_chat("x", QUESTION, both, {})
    words: Any = ["hi"]
    with pytest.raises(PromptError, match="an object of role and content"):
        render_chat("x", words, ChatOptions(), {})


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, folder: Path) -> Write:
    """Writes files, given by name and content, beside a tokenizer with `settings`."""
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())

    def write_files(settings: dict[str, Any], **files: Any) -> Path:
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        for name, content in files.items():
            path = tmp_path / name.replace("__", "/").replace("_DOT_", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return write_files


FOLDERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "in the settings": ({"chat_template": "A{{ eos_token }}", "eos_token": "</s>"}, {}),
    "by name": (
        {
            "chat_template": [
                {"name": "default", "template": "A"},
                {"name": "tool_use", "template": "B"},
            ]
        },
        {},
    ),
    "a file before the settings": ({"chat_template": "A"}, {"chat_template_DOT_jinja": "B"}),
    "additional": (
        {},
        {
            "chat_template_DOT_jinja": "A",
            "additional_chat_templates__tool_use_DOT_jinja": "B",
            "additional_chat_templates__rag_DOT_jinja": "C",
        },
    ),
    "token as an object": (
        {
            "chat_template": "{{ bos_token }}{{ pad_token is defined }}{{ pad_token }}",
            "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True},
            "pad_token": None,
        },
        {},
    ),
    "old map of special tokens": (
        {"chat_template": "{{ bos_token }}{{ unk_token }}", "bos_token": "<pad>"},
        {"special_tokens_map_DOT_json": {"bos_token": "<s>", "unk_token": {"content": "</s>"}}},
    ),
    "map beside newer settings": (
        {
            "chat_template": "{{ bos_token }}{{ unk_token }}",
            "bos_token": "<pad>",
            "added_tokens_decoder": {"258": {"content": "<pad>", "special": True}},
        },
        {"special_tokens_map_DOT_json": {"bos_token": "<s>", "unk_token": "</s>"}},
    ),
    "tokens of the model's own": (
        {
            "chat_template": "{{ image_token }}{{ audio_token }}{{ boi_token }}",
            "image_token": "<unused>",
            "extra_special_tokens": {"audio_token": "<|user|>"},
        },
        {},
    ),
}


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_templates_and_tokens_of_a_folder(
    kind: str, tools: list[dict[str, Any]] | None, write: Write
) -> None:
    from transformers import AutoTokenizer

    settings, files = FOLDERS[kind]
    path = write(settings, **files)
    theirs = AutoTokenizer.from_pretrained(path)
    chosen = ChatFiles.read(path)
    text = render_chat(
        chosen.template(with_tools=tools is not None),
        QUESTION,
        ChatOptions(tools=tools),
        chosen.special_tokens,
    )
    assert text == theirs.apply_chat_template(
        QUESTION, tools=tools, tokenize=False, add_generation_prompt=True
    )


def test_a_processors_file_counts_where_the_tokenizer_has_none(write: Write) -> None:
    template = "{{ messages[0].content }}!"
    path = write({}, chat_template_DOT_json={"chat_template": template})
    tokenizer = Tokenizer.from_folder(path)
    assert tokenizer is not None
    assert tokenizer.render_chat(QUESTION) == "hi!"
    assert tokenizer.encode_chat(QUESTION) == tokenizer.encode("hi!")
    write({"chat_template": "own"})
    assert tokenizer.render_chat(QUESTION) == "own"


def test_no_default_among_several(write: Write) -> None:
    path = write({}, additional_chat_templates__rag_DOT_jinja="C")
    with pytest.raises(FolderError, match=r"chat templates \(rag\), but none is the default"):
        ChatFiles.read(path).template(with_tools=False)


def test_tokens_of_the_class_are_transformers() -> None:
    import inspect

    import transformers

    for name, tokens in _CLASS_TOKENS.items():
        parameters = inspect.signature(getattr(transformers, name).__init__).parameters
        defaults = {
            key: parameter.default
            for key, parameter in parameters.items()
            if key.endswith("_token") and isinstance(parameter.default, str)
        }
        assert tokens == defaults, name
