"""A model behind an OpenAI endpoint as a model to evaluate."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trianglemix.custom_ops.errors import ConfigurationError
from trianglemix.evaluation.endpoint import Endpoint, ModelCard, ServerError
from trianglemix.evaluation.model import Answer
from trianglemix.runtime.tokenizer import Tokenizer


class ServedModel:
    """A model of an endpoint, given the token ids that a local model would get."""

    def __init__(self, endpoint: Endpoint, card: ModelCard, tokenizer: Tokenizer) -> None:
        """Asks for one token.

        Raises:
            ServerError: the server does not answer, or takes no token ids.
        """
        self.tokenizer = tokenizer
        self._endpoint, self._card = endpoint, card
        try:
            self.answer(tuple(tokenizer.encode("One, two, three")), 1)
        except ServerError as error:
            raise ServerError(f"{error} (a prompt of a few token ids, to try it)") from error

    @property
    def facts(self) -> Mapping[str, Any]:
        """Kind, address, context, and the layers that our plug-in says it replaced so far."""
        layers = self._endpoint.layers_by_kind() or {}
        return {
            "kind": "served",
            "address": self._endpoint.base_url,
            "served model": self._card.name,
            "root": self._card.root,
            "context": self._card.context,
            "triangle_layers": layers.get("triangle"),
            "block_sparse_layers": layers.get("block_sparse"),
        }

    def answer(self, ids: tuple[int, ...], max_new_tokens: int) -> Answer:
        """Greedy, one prompt; the time to the first token is that of the client.

        Raises:
            ServerError: the server does not answer, or read other tokens than these.
        """
        found = self._endpoint.complete(self._card.name, ids, max_new_tokens, self._own_fields())
        if found.prompt_tokens not in (None, len(ids)):
            raise ServerError(
                f"{self._endpoint.base_url} read {found.prompt_tokens} tokens where {len(ids)} ids "
                "were given: it takes no token ids as they are"
            )
        text = self.tokenizer.decode(found.tokens) if found.tokens else found.text
        return Answer(text, len(ids), found.ttft_s)

    def _own_fields(self) -> dict[str, Any]:
        """vLLM's own: no cache of an earlier prompt, no penalty that the model's folder names.

        And the answer's tokens: its text leaves out a last character that is not whole.
        """
        if not self._card.is_vllm:
            return {}
        return {
            "cache_salt": uuid.uuid4().hex,
            "repetition_penalty": 1.0,
            "return_token_ids": True,
        }

    def peak_memory_mb(self) -> None:
        """Not known: it is the server's."""


def choose_model(endpoint: Endpoint, name: str | None, option: str) -> ModelCard:
    """The endpoint's model of that name, or its only one.

    Raises:
        ConfigurationError: there is no such model, or several; `option` would name one.
        ServerError: the server is not there.
    """
    cards = endpoint.models()
    if cards is None:
        if name is None:
            raise ConfigurationError(
                f"{endpoint.base_url} has no list of models; name the model with {option}, or give "
                "the base URL, such as http://localhost:8000/v1"
            )
        return ModelCard(name, None, None, False)
    names = ", ".join(card.name for card in cards) or "none"
    if name is None:
        if len(cards) != 1:
            raise ConfigurationError(f"{endpoint.base_url} serves {names}; name one with {option}")
        return cards[0]
    for card in cards:
        if card.name == name:
            return card
    raise ConfigurationError(f"{endpoint.base_url} serves no {name!r}, but {names}")


def check_context(endpoint: Endpoint, card: ModelCard, tokens: int) -> None:
    """Raises ConfigurationError where prompts and answers of so many tokens do not fit."""
    if card.context is not None and tokens > card.context:
        raise ConfigurationError(
            f"prompts and answers of up to {tokens} tokens, but {card.name} is served at "
            f"{endpoint.base_url} with a context of {card.context}; give fewer --tokens, or serve "
            "it with a longer context (vLLM: --max-model-len)"
        )


def find_tokenizer(card: ModelCard, folder: Path | None) -> tuple[Tokenizer, Path]:
    """The tokenizer of `folder`, else of the folder that is served where that is here.

    Raises:
        ConfigurationError: there is neither.
    """
    place = folder or (Path(card.root) if card.root else None)
    if place is None or not place.is_dir():
        reason = f"{place} is no folder here" if place else "the server does not say its folder"
        raise ConfigurationError(
            f"the prompts of {card.name} need its tokenizer, but {reason}; give --tokenizer FOLDER "
            "with its tokenizer.json"
        )
    tokenizer = Tokenizer.from_folder(place)
    if tokenizer is None:
        raise ConfigurationError(
            f"{place} has no tokenizer.json, which the prompts of {card.name} need; give "
            "--tokenizer FOLDER"
        )
    return tokenizer, place
