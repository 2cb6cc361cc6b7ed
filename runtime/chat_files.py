"""What a folder's tokenizer files say about chats: templates by name, and special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from trianglemix.runtime.errors import FolderError
from trianglemix.runtime.model_folder import read_settings

DEFAULT: Final = "default"
_TOOL_USE: Final = "tool_use"
_NAMED: Final = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip

_GPT: Final = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
_CLASS_TOKENS: Final[Mapping[str, Mapping[str, str]]] = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GemmaTokenizer": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    "GPT2Tokenizer": _GPT,
    "GPTNeoXTokenizer": {**_GPT, "pad_token": "<|padding|>"},
    "CodeGenTokenizer": _GPT,
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "CohereTokenizer": {
        "bos_token": "<BOS_TOKEN>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "unk_token": "<UNK>",
        "pad_token": "<PAD>",
        "cls_token": "<CLS>",
        "sep_token": "<SEP>",
        "mask_token": "<MASK_TOKEN>",
    },
}
"""Tokens that transformers' tokenizer classes have where the settings do not name one."""


@dataclass(frozen=True)
class ChatFiles:
    """Templates by name (`default`, `tool_use`, ...), and special tokens as templates see them."""

    templates: Mapping[str, str]
    special_tokens: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path) -> ChatFiles:
        """Reads what transformers reads, with its order of precedence.

        Raises:
            FolderError: a file is there, but cannot be read.
        """
        settings = read_settings(folder / "tokenizer_config.json")
        return cls(_templates(folder, settings), _special_tokens(folder, settings))

    def template(self, *, with_tools: bool) -> str:
        """The template of a chat; with tools the one for them, where there is one.

        Raises:
            FolderError: none, or several and none of them the default.
        """
        if with_tools and _TOOL_USE in self.templates:
            return self.templates[_TOOL_USE]
        if DEFAULT in self.templates:
            return self.templates[DEFAULT]
        if self.templates:
            names = ", ".join(sorted(self.templates))
            raise FolderError(
                f"the folder has chat templates ({names}), but none is the default; "
                "save the one that is wanted as chat_template.jinja"
            )
        raise FolderError("the folder has no chat template; give the prompt as plain text")


def _templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Files of their own come before the settings, and a processor's old file comes last."""
    own = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        own[DEFAULT] = folder / "chat_template.jinja"
    texts = {name: _text(path) for name, path in own.items()}
    named = _by_name(settings.get("chat_template"))
    if DEFAULT in texts:
        return texts
    for name in ("chat_template.json", "processor_config.json"):
        if DEFAULT not in named:
            named = {**_by_name(read_settings(folder / name).get("chat_template")), **named}
    return {**named, **texts}


def _by_name(entry: object) -> dict[str, str]:
    """One template, a list of `{"name", "template"}`, or an object of templates by name."""
    if isinstance(entry, str):
        return {DEFAULT: entry}
    if isinstance(entry, list):
        entry = {one.get("name"): one.get("template") for one in entry if isinstance(one, dict)}
    if not isinstance(entry, dict):
        return {}
    return {str(name): text for name, text in entry.items() if isinstance(text, str)}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise FolderError(f"{path} cannot be read ({error}); repair or remove it") from error


def _special_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """`special_tokens_map.json` counts only beside settings of the older kind, and then first."""
    if "added_tokens_decoder" not in settings:
        settings = {**settings, **read_settings(folder / "special_tokens_map.json")}
    kind = str(settings.get("tokenizer_class", "")).removesuffix("Fast")
    tokens: dict[str, object] = {**_CLASS_TOKENS.get(kind, {})}
    tokens |= {name: settings[name] for name in _NAMED if name in settings}
    tokens |= {
        name: token
        for name, token in settings.items()
        if name.endswith("_token") and name not in _NAMED and isinstance(token, str)
    }
    extra = settings.get("extra_special_tokens")
    tokens |= extra if isinstance(extra, dict) else {}
    texts = {name: _token_text(token) for name, token in tokens.items()}
    return {name: text for name, text in texts.items() if text is not None}


def _token_text(token: object) -> str | None:
    """A special token, written as text or as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
