"""A manifest that was edited by hand is refused in one line, or says what it said before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

import pytest
from trianglemix.custom_ops.errors import TriangleMixError
from trianglemix.manifest.manifest import FILE_NAME, Manifest, ManifestError
from trianglemix.runtime import TriangleSession

STRANGE: Final = (
    None, True, -2, 0, 1.5, 2**40, 2**70, "", "foo", "../g/model.onnx", "/etc/hostname", "a\nb",
    [], [1.5], ["1"], {}, {"x": 1},
)  # fmt: skip
Place = tuple[str | int, ...]


def places(content: Any, here: Place = ()) -> Iterator[Place]:
    """Every value of the file, tables in tables too."""
    if here:
        yield here
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items if isinstance(content, dict | list) else ():
        if isinstance(value, dict | list):
            yield from places(value, (*here, key))
        else:
            yield (*here, key)


def at(content: Any, place: Place) -> Any:
    for key in place:
        content = content[key]
    return content


@pytest.fixture
def content(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    return loaded


def load(content: Any, folder: Path) -> Manifest:
    (folder / FILE_NAME).write_text(json.dumps(content), encoding="utf-8")
    return Manifest.load(folder)


def test_any_value_in_any_place(content: dict[str, Any], tmp_path: Path) -> None:
    """Refused in a line, or of the types that the class declares: it can be written again."""
    messages = []
    for place in places(content):
        for strange in STRANGE:
            edited = deepcopy(content)
            at(edited, place[:-1])[place[-1]] = strange
            try:
                manifest = load(edited, tmp_path)
            except ManifestError as error:
                messages.append(str(error))
                continue
            manifest.save(tmp_path)
            assert Manifest.load(tmp_path) == manifest
            kind = type(at(content, place))
            assert isinstance(strange, kind) or _may_be(place, strange), (place, strange)
    assert len(messages) > 1000
    assert not [message for message in messages if "\n" in message or len(message) > 1000]


def _may_be(place: Place, value: Any) -> bool:
    """Values of another type than the file's own that are allowed in their places."""
    if value is None:  # optional names, layers, axes, shapes, defaults
        return True
    last = place[-1]
    if place[-2:-1] == ("shape",) or last == "shape":
        return isinstance(value, int | str | list)
    optional = {"attention_mask", "position_ids", "prompt_length", "context_length", "layer",
                "batch_axis", "token_axis", "carried_from", "permutation"}  # fmt: skip
    return last in optional or value in ([], {})


def test_a_key_more_or_less(content: dict[str, Any], tmp_path: Path) -> None:
    more = {**content, "heads": 4}
    with pytest.raises(ManifestError, match="heads is 4: unexpected keyword"):
        load(more, tmp_path)
    del more["heads"], more["cache"]
    with pytest.raises(ManifestError, match="cache: field required"):
        load(more, tmp_path)


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, '{"a":' * 100_000, "NaN", "[1e999]"])
def test_what_is_no_manifest(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(ManifestError):
        Manifest.load(tmp_path)


def test_contradictions(content: dict[str, Any], tmp_path: Path) -> None:
    layer = content["cache"][1]
    swapped = layer | {"past_key": layer["past_value"], "past_value": layer["past_key"]}
    other = content["cache"][0]["past_key"]
    edits: dict[str, dict[str, Any]] = {
        "has layer 1 twice": {"triangle_layers": [1, 1]},
        "has layer 3, of 3 layers": {"triangle_layers": [3]},
        "is both a triangle and": {"block_sparse_layers": [1], "block_rule": {}},
        "without a rule": {"block_sparse_layers": [0]},
        "that 'past_key_values.1.value' is the past_key of layer 1": {"cache": [swapped]},
        "is the past_key of layer 1": {"cache": [layer | {"past_key": other}]},
        "has 4 key/value heads of 8": {"cache": [layer | {"kv_num_heads": 4}]},
        "that 'input_ids' is the logits": {"logits": "input_ids"},
        "the name of two inputs": {"inputs": content["inputs"] + content["inputs"][:1]},
        "model_file: '../model.onnx' must be": {"model_file": "../model.onnx"},
        "target is 'T P U': string should match": {"target": "T P U"},
        "cache_dtype: 'foo' must be one of": {"cache_dtype": "foo"},
    }
    for words, edit in edits.items():
        with pytest.raises(ManifestError) as caught:
            load(content | edit, tmp_path)
        assert words in str(caught.value)


def renamed(content: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """The manifest with another name of an input or output wherever it stands."""
    edited: dict[str, Any] = json.loads(json.dumps(content).replace(f'"{old}"', f'"{new}"'))
    return edited


def test_a_manifest_of_another_model(content: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    halved = json.loads(json.dumps(content).replace('"float32"', '"float16"'))
    narrow = deepcopy(content)
    for value in (*narrow["inputs"], *narrow["outputs"]):
        if value["layer"] is not None:
            value["shape"][3] = 4
    for cache in narrow["cache"]:
        cache["head_size"] = cache["value_head_size"] = 4
    missing = content | {"inputs": [x for x in content["inputs"] if x["role"] != "position_ids"],
                         "position_ids": None}  # fmt: skip
    outputs = deepcopy(content["outputs"])
    next(x for x in outputs if x["name"] == "logits")["name"] = "scores"
    edits = {
        "it has no input past_key_values.9.key": renamed(
            content, "past_key_values.1.key", "past_key_values.9.key"
        ),
        "it has no output scores": content | {"logits": "scores", "outputs": outputs},
        "is tensor(float), not tensor(float16)": halved,
        "not ['B', 2, 'P', 4]": narrow,
        "has an input position_ids that the manifest has not": missing,
    }
    for words, edited in edits.items():
        (tmp_path / FILE_NAME).write_text(json.dumps(edited), encoding="utf-8")
        with pytest.raises(TriangleMixError) as caught:
            TriangleSession.from_folder(tmp_path, "cpu", threads=1)
        assert words in str(caught.value)
