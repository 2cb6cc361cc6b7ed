"""Text survives the way through tokens, also when they come one by one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from trianglemix.runtime.errors import FolderError, MissingPackageError, PromptError
from trianglemix.runtime.tokenizer import TextStream, Tokenizer

TEXT = "Grüße — 东京 😀, done"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The folder's tokenizer files, free to be changed."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / name, tmp_path / name)
    return tmp_path


def _tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


def test_pieces_are_whole_characters_and_make_the_text(folder: Path) -> None:
    tokenizer = _tokenizer(folder)
    ids = tokenizer.encode(TEXT)
    assert len(ids) == len(TEXT.encode())  # one token per byte: characters do get cut
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids] + [stream.flush()]
    assert [piece for piece in pieces if piece] == list(TEXT)


def test_what_is_cut_at_the_end_still_comes(folder: Path) -> None:
    tokenizer = _tokenizer(folder)
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in tokenizer.encode("é")[:1]] == [""]
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"
    assert stream.flush() == ""


def test_special_tokens_are_no_text(folder: Path) -> None:
    tokenizer = _tokenizer(folder)
    ids = [*tokenizer.encode("a"), 257, *tokenizer.encode("b")]
    assert tokenizer.decode(ids) == "ab"


def test_settings_for_training_do_not_cut_the_prompt(copy: Path) -> None:
    path = copy / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path.write_text(json.dumps(content))
    assert len(_tokenizer(copy).encode("longer than four")) == 16


def test_chat_template(folder: Path, copy: Path) -> None:
    tokenizer = _tokenizer(folder)
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert ids == tokenizer.encode("<|user|>hi<|end|><|assistant|>")
    (copy / "chat_template.jinja").unlink()
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": "{{ bos_token }}{{ messages|length }}"}
    ]
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    both = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert _tokenizer(copy).encode_chat(both) == tokenizer.encode("<s>2")


def test_chat_template_may_refuse(copy: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    (copy / "chat_template.jinja").write_text(template)
    with pytest.raises(PromptError, match="roles must alternate"):
        _tokenizer(copy).encode_chat([{"role": "user", "content": "a"}])


def test_missing_files(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(FolderError, match="no chat template"):
        _tokenizer(copy).encode_chat([])
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(FolderError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(copy)
    (copy / "tokenizer.json").unlink()
    assert Tokenizer.from_folder(copy) is None


def test_missing_packages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = _tokenizer(folder)
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(MissingPackageError, match="jinja2 is not installed"):
        tokenizer.encode_chat([])
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(MissingPackageError, match="tokenizers is not installed"):
        Tokenizer.from_folder(folder)


def _change_settings(folder: Path, **settings: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_tokens_that_only_the_settings_name(copy: Path) -> None:
    from transformers import AutoTokenizer

    size = _tokenizer(copy)._tokenizer.get_vocab_size()
    added = {"257": {"content": "</s>", "special": True}}
    added |= {str(size): {"content": "<new>", "special": True, "lstrip": True},
              str(size + 1): {"content": "word", "special": False}}  # fmt: skip
    _change_settings(copy, added_tokens_decoder=added)
    theirs, text = AutoTokenizer.from_pretrained(copy), "a <new>b word"
    assert _tokenizer(copy).encode(text) == theirs.encode(text)
    assert size in theirs.encode(text)
    _change_settings(copy, added_tokens_decoder={"900": {"content": "<new>"}})
    with pytest.raises(FolderError, match=f"<new> the id 900, but by .* it would get {size}"):
        Tokenizer.from_folder(copy)


def test_tokens_of_an_older_folder(copy: Path) -> None:
    size = _tokenizer(copy)._tokenizer.get_vocab_size()
    (copy / "added_tokens.json").write_text(json.dumps({"<new>": size, "</s>": 257}))
    _change_settings(copy, added_tokens_decoder={})
    assert _tokenizer(copy).encode("<new>") == [size]


def test_a_beginning_that_stands_twice_is_told(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = copy / "tokenizer.json"
    content = json.loads(path.read_text())
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}},
    }
    path.write_text(json.dumps(content))
    (copy / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    tokenizer = _tokenizer(copy)
    assert tokenizer.encode_chat([{"role": "user", "content": "a"}]).count(256) == 1
    assert tokenizer.encode("a").count(256) == 1
    assert not caplog.records
    assert tokenizer.encode("<s>a").count(256) == 2
    assert "stands there twice" in caplog.text
