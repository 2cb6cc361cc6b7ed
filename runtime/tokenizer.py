"""Text to token ids and back, from an exported folder's tokenizer files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trianglemix.runtime.chat_files import ChatFiles
from trianglemix.runtime.errors import FolderError, MissingPackageError
from trianglemix.runtime.model_folder import read_settings

if TYPE_CHECKING:
    import tokenizers
    from trianglemix.runtime.chat_template import ChatOptions, Message

_LOG = logging.getLogger(__name__)
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a cut UTF-8 sequence decodes to


class Tokenizer:
    """`tokenizer.json` through the `tokenizers` package, and the folder's chat template."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
        self._tokenizer = tokenizer
        self._folder = folder

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer | None:
        """The folder's tokenizer; None where it has no `tokenizer.json`.

        Raises:
            MissingPackageError: the `tokenizers` package is not installed.
            FolderError: the file cannot be read.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            from tokenizers import Tokenizer as Reader
        except ImportError as error:
            raise MissingPackageError(
                "the package tokenizers is not installed, which reads tokenizer.json; "
                "pip install 'trianglemix[cpu]' (or [gpu]), or give token ids instead of text"
            ) from error
        try:
            tokenizer = Reader.from_file(str(path))
        except Exception as error:  # the package raises nothing narrower
            raise FolderError(f"{path} cannot be read ({error}); export again") from error
        # Saved settings for training would cut or fill a prompt behind the user's back.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _add_missing_tokens(tokenizer, folder)
        return cls(tokenizer, folder)

    def encode(self, text: str) -> list[int]:
        """Token ids with the special tokens that the tokenizer adds by itself."""
        ids: list[int] = self._tokenizer.encode(text).ids
        bos = self.bos_id
        if bos is not None and ids[:2] == [bos, bos]:
            _LOG.warning(
                "the prompt spells out the token that begins a text, which the tokenizer adds "
                "too: it stands there twice; leave it out of the prompt"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def encode_chat(
        self, messages: Sequence[Message], options: ChatOptions | None = None
    ) -> list[int]:
        """Token ids of a conversation (`role`, `content`), ready for the assistant's answer.

        Raises:
            FolderError: the folder has no chat template.
            PromptError: the template refuses these messages.
        """
        text = self._render(messages, options)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, whether or not it is added; None where none is named."""
        return self._special_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text; None where none is named."""
        return self._special_id("eos_token")

    def _special_id(self, name: str) -> int | None:
        text = ChatFiles.read(self._folder).special_tokens.get(name)
        found: int | None = self._tokenizer.token_to_id(text) if text else None
        return found

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, special tokens spelled out; errors as of `encode_chat`.

        `add_generation_prompt` opens the assistant's answer at its end. The text begins with
        the special token that a plain text gets by itself: `encode` would put another before it.
        """
        from trianglemix.runtime.chat_template import ChatOptions

        return self._render(messages, ChatOptions(add_generation_prompt=add_generation_prompt))

    def _render(self, messages: Sequence[Message], options: ChatOptions | None) -> str:
        try:
            import jinja2  # noqa: F401
        except ImportError as error:
            raise MissingPackageError(
                "the package jinja2 is not installed, which fills in a chat template; "
                "pip install 'trianglemix[cpu]' (or [gpu])"
            ) from error
        from trianglemix.runtime.chat_template import ChatOptions, render_chat

        options = options or ChatOptions()
        files = ChatFiles.read(self._folder)
        source = files.template(with_tools=options.tools is not None)
        return render_chat(source, messages, options, files.special_tokens)


class TextStream:
    """Turns tokens that arrive one by one into pieces of text.

    A piece is held back while its last character is incomplete. The text before it is decoded
    again with every piece, because a token's text may depend on what stands before it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._emitted = 0  # tokens whose text is out
        self._context = 0  # where decoding starts: the previous piece

    def push(self, token: int) -> str:
        """The text that `token` completes, perhaps none."""
        self._ids.append(token)
        text = self._pending()
        return "" if text.endswith(_INCOMPLETE) else self._emit(text)

    def flush(self) -> str:
        """Whatever is held back, complete or not."""
        return self._emit(self._pending())

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._emitted])
        return self._tokenizer.decode(self._ids[self._context :])[len(before) :]

    def _emit(self, text: str) -> str:
        self._context, self._emitted = self._emitted, len(self._ids)
        return text


def _add_missing_tokens(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Tokens that the settings name and `tokenizer.json` lacks, as transformers adds them.

    Raises:
        FolderError: such a token's id is not the next one, so that it would get another.
    """
    from tokenizers import AddedToken

    named = read_settings(folder / "tokenizer_config.json").get("added_tokens_decoder")
    tokens = {int(key): entry for key, entry in named.items()} if isinstance(named, dict) else {}
    if not tokens:
        older = read_settings(folder / "added_tokens.json")
        tokens = {number: {"content": text} for text, number in older.items()}
    for number, entry in sorted(tokens.items()):
        text = str(entry["content"])
        if tokenizer.token_to_id(text) is not None:
            continue
        flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
        given = {flag: bool(entry[flag]) for flag in flags if flag in entry}
        tokenizer.add_tokens([AddedToken(text, **given)])
        if tokenizer.token_to_id(text) != number:
            raise FolderError(
                f"the settings in {folder} give the token {text} the id {number}, but by "
                f"tokenizer.json it would get {tokenizer.token_to_id(text)}; take both files from "
                "one model"
            )
