"""Whatever a graph's interface is like: the runtime feeds it, or the export says why it cannot.

Every decoder is compared with its own source in plain ONNX Runtime, whose whole text is run anew
for every token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray
from trianglemix.exporter.errors import ExportError
from trianglemix.exporter.options import ExportOptions, LayerRequest, PatternRequest
from trianglemix.exporter.pipeline import export
from trianglemix.exporter.report.export_report import ExportReport
from trianglemix.manifest.manifest import RUNS, Manifest
from trianglemix.runtime import TriangleSession
from trianglemix.runtime.errors import FolderError, PromptError

from tests.end_to_end import odd_interfaces as odd
from tests.end_to_end.odd_interfaces import Interface, prompt
from tests.odd.odd_model import HIDDEN
from tests.sources.cell import SilentObserver

Array = NDArray[Any]
LENGTH, NEW_TOKENS = 13, 5
KEEP_ALL: Final = PatternRequest(sink=0, window=1 << 20, last=1)
INTERFACES: Final[dict[str, Interface]] = {
    "int32": Interface({"ids_dtype": "int32", "mask_dtype": "int32"}),
    "float mask": Interface({"mask_dtype": "float32"}),
    "float16 mask": Interface({"mask_dtype": "float16"}),
    "bool mask": Interface({"mask_dtype": "bool"}),
    "positions [S]": Interface({"positions": "rank1"}),
    "positions [3, B, S]": Interface({"positions": "rank3"}),
    "no positions": Interface({"positions": "slots"}),
    "batch of one": Interface({"batch": 1, "mask_dtype": "bool"}),
    "batch of one, positions [3, 1, S]": Interface({"batch": 1, "positions": "rank3"}),
    "float16 cache": Interface({"cache_dtype": "float16"}),
    "cache [B, T, H, D]": Interface({"cache": "BTHD"}),
    "presents of new tokens": Interface({}, odd.presents_of_new_tokens),
    "presents transposed": Interface({}, odd.presents_transposed),
    "shared keys and values": Interface({"num_layers": 3, "shares": True}),
    "no cache": Interface({"cache": "none", "mask_dtype": "float32"}),
    "no cache, positions [3, B, S]": Interface({"cache": "none", "positions": "rank3"}),
    "no cache, but a convolution": Interface({"cache": "none", "extra": "convolution"}),
    "convolution": Interface({"extra": "convolution"}),
    "convolution by other names": Interface(
        {"extra": "convolution"},
        odd.states_of_other_names,
        lambda length: {"a": np.zeros((1, HIDDEN, 2), np.float32)},
    ),
    "convolution, batch of one": Interface(
        {"extra": "convolution", "batch": 1, "ids_dtype": "int32", "cache_dtype": "float16"}
    ),
    "logits kept": Interface({"extra": "keep_logits"}),
    "logits kept [1]": Interface(
        {"extra": "keep_logits"},
        odd.counted_logits_as_a_list,
        lambda length: {"num_logits_to_keep": np.array([0])},
    ),
    "token types": Interface({"extra": "token_types"}),
    "cache position": Interface({"extra": "cache_position"}),
    "router first": Interface({"extra": "router_first"}),
    "other names": Interface({}, odd.other_names),
    "other names throughout": Interface({}, odd.other_names_throughout),
    "other names, open vocabulary": Interface(
        {"extra": "token_types"}, odd.other_names_and_open_vocabulary
    ),
    "positions of another name": Interface({}, odd.positions_of_another_name),
    "positions of another name [S]": Interface(
        {"positions": "rank1"}, odd.positions_of_another_name
    ),
    "positions of another name [3, B, S]": Interface(
        {"positions": "rank3"}, odd.positions_of_another_name
    ),
    "token types of all tokens": Interface({"extra": "token_types"}, odd.token_types_of_all),
    "token types of an open length": Interface(
        {"extra": "token_types"}, odd.token_types_of_open_length
    ),
    "rows reordered": Interface(
        {}, odd.reordered_rows, lambda length: {"beam_idx": np.array([0], np.int32)}
    ),
    "start position": Interface(
        {"positions": "slots"}, odd.start_position, lambda length: {"start_pos": np.array(0)}
    ),
    "offset": Interface(
        {"positions": "slots"}, odd.offset_of_positions, lambda length: {"offset": np.array([0])}
    ),
    "logits [B, V]": Interface({}, odd.logits_of_one_row),
    "last row": Interface({"extra": "last_row"}),
    "one token a call": Interface({}, odd.one_token_a_call),
    "a default": Interface({}, odd.an_input_with_a_default),
    "lengths": Interface(
        {},
        odd.lengths_as_inputs,
        lambda length: {
            "total_sequence_length": np.array(length, np.int32),
            "past_sequence_length": np.array([0], np.int32),
            "seqlens_k": np.array([length - 1], np.int32),
        },
    ),
}


def exported(interface: Interface, folder: Path, **options: Any) -> ExportReport:
    source = interface.write(folder / "source" / "model.onnx")
    given = {"layers": LayerRequest(layers=(1,)), "pattern": KEEP_ALL, **options}
    return export(ExportOptions(source=source, output=folder / "out", **given), SilentObserver())


def session_of(folder: Path) -> TriangleSession:
    session = TriangleSession.from_folder(folder / "out", provider="cpu", threads=1)
    session.stop_ids = frozenset()
    return session


def runs(session: TriangleSession, steps: list[list[int]], prompt_end: int) -> list[Array]:
    """Logits `[vocabulary]` after each of the steps."""
    held, logits = session.new_cache(), []
    for step in steps:
        row = held.extend(np.array([step]), None, prompt_end)
        assert row is not None
        logits.append(row[0])
    return logits


def assert_source(interface: Interface, folder: Path, text: list[int], got: Array) -> None:
    source = folder / "source" / "model.onnx"
    if interface.change is odd.one_token_a_call:  # it cannot read a whole text
        source = Interface({}).write(folder / "free" / "model.onnx")
    wanted = interface.logits(source, text)
    allowed = interface.model.tolerance * float(np.abs(wanted).max())
    np.testing.assert_allclose(got, wanted, rtol=0, atol=allowed)


@pytest.mark.parametrize("name", INTERFACES)
def test_it_gives_the_sources_logits(name: str, tmp_path: Path) -> None:
    """Of a prompt, a prompt in two calls, and decode steps; rows of a batch are as alone."""
    interface = INTERFACES[name]
    report = exported(interface, tmp_path)
    assert not [line for line in report.warnings if "trianglemix-run" in line]
    session, text = session_of(tmp_path), prompt(LENGTH)
    for steps in ([text[:9], *([x] for x in text[9:])], [text[:6], text[6:]]):
        read: list[int] = []
        for step, logits in zip(steps, runs(session, steps, 9), strict=True):
            read += step
            assert_source(interface, tmp_path, read, logits)
    prompts = [text, prompt(LENGTH - 4, seed=8)]
    alone = [session.generate(ids, NEW_TOKENS).ids for ids in prompts]
    assert [result.ids for result in session.generate(prompts, NEW_TOKENS)] == alone


@pytest.mark.parametrize("name", ["int32", "batch of one", "convolution", "no cache", "lengths"])
def test_a_triangle_in_chunks_is_one_in_one_pass(name: str, tmp_path: Path) -> None:
    text = prompt(40)
    first = LayerRequest(layers=(0,))  # what the last layer drops the last row does not see
    small = PatternRequest(sink=2, window=5, last=3)
    exported(INTERFACES[name], tmp_path, layers=first, pattern=small)
    session = session_of(tmp_path)
    (whole,) = runs(session, [text], 40)
    chunks = runs(session, [text[at : at + 7] for at in range(0, 40, 7)], 40)
    np.testing.assert_allclose(chunks[-1], whole, rtol=0, atol=1e-4 * np.abs(whole).max())
    exported(INTERFACES[name], tmp_path, force=True)  # keeps all
    (dense,) = runs(session_of(tmp_path), [text], 40)
    assert np.abs(dense - whole).max() > 1e-3 * np.abs(dense).max()


def test_without_a_cache_decoding_is_what_it_is_with_one(tmp_path: Path) -> None:
    """What the prompt's rows dropped stays dropped, and a new token's row drops nothing."""
    steps, read = [prompt(40), *([x] for x in prompt(4, seed=1))], []
    for name in ("int32", "no cache"):
        first, small = LayerRequest(layers=(0,)), PatternRequest(sink=2, window=5, last=3)
        exported(INTERFACES[name], tmp_path / name, layers=first, pattern=small)
        read.append(np.stack(runs(session_of(tmp_path / name), steps, 40)))
    np.testing.assert_allclose(read[1], read[0], rtol=0, atol=1e-4 * np.abs(read[0]).max())


def test_a_state_of_unknown_use_takes_no_chunks(tmp_path: Path) -> None:
    interface = Interface({"extra": "convolution"}, odd.state_read_by_one_token)
    report = exported(interface, tmp_path)
    assert [note for note in report.notes if "cannot come in chunks" in note]
    session = session_of(tmp_path)
    (whole,) = runs(session, [prompt(LENGTH)], LENGTH)
    assert_source(interface, tmp_path, prompt(LENGTH), whole)
    with pytest.raises(PromptError, match="leave out prefill_chunk"):
        session.generate(prompt(LENGTH), 1, prefill_chunk=5)
    conversation = session.new_cache()
    session.generate(prompt(LENGTH), 1, cache=conversation)
    with pytest.raises(PromptError, match="as one prompt"):
        session.generate(prompt(LENGTH), 1, cache=conversation)


def test_no_chunk_straddles_a_length_that_changes_the_rotation(tmp_path: Path) -> None:
    """Of 25 tokens and 5 new ones, where the rotation is another beyond 20."""
    interface = Interface({"branches": True, "size": 10})
    report = exported(interface, tmp_path)
    assert [note for note in report.notes if "otherwise beyond 20 tokens" in note]
    session = session_of(tmp_path)
    assert session.manifest.length_switches == (20,)
    text = prompt(25)
    (whole,) = runs(session, [text], 25)
    assert_source(interface, tmp_path, text, whole)
    (parted,) = runs(session, [text[:22], text[22:]], 25)[1:]
    assert_source(interface, tmp_path, text, parted)
    (wrong,) = runs(session, [text[:10], text[10:]], 25)[1:]  # what is refused below
    assert np.abs(wrong - whole).max() > 1e-3 * np.abs(whole).max()
    with pytest.raises(PromptError, match="give more than 20"):
        session.generate(text, NEW_TOKENS, prefill_chunk=10)
    assert session.generate(text, 1, prefill_chunk=21).ids == session.generate(text, 1).ids
    assert session.generate(text[:15], 1, prefill_chunk=10).ids
    conversation = session.new_cache()
    session.generate(text[:10], 1, cache=conversation)
    session.generate(text[:5], 1, cache=conversation)
    with pytest.raises(PromptError, match="as one prompt, without a cache"):
        session.generate(text[:10], 1, cache=conversation)
    beyond = session.new_cache()
    session.generate(text, 1, cache=beyond)
    assert session.generate(text[:5], 1, cache=beyond).ids
    prompts = [text, prompt(12, seed=2)]
    alone = [session.generate(ids, NEW_TOKENS).ids for ids in prompts]
    assert [result.ids for result in session.generate(prompts, NEW_TOKENS)] == alone


def test_an_answer_that_passes_such_a_length_is_read_again(tmp_path: Path) -> None:
    """Each token is that of the text before it in one pass, on both sides of 20."""
    exported(Interface({"branches": True, "size": 10}), tmp_path, pattern=KEEP_ALL)
    session = session_of(tmp_path)
    texts = [prompt(17), prompt(17, seed=3)]
    for text, result in zip(texts, session.generate(texts, 8), strict=True):
        expected = list(text)
        for _ in range(8):
            expected.append(session.generate(expected, 1).ids[0])
        assert [*text, *result.ids] == expected
    conversation = session.new_cache()
    with pytest.raises(PromptError, match="give max_new_tokens 4 or less"):
        session.generate(texts[0], 5, cache=conversation)
    session.generate(texts[0], 4, cache=conversation)
    with pytest.raises(PromptError, match="the 21 tokens before"):
        session.generate([5], 1, cache=conversation)


def test_a_cache_of_limited_length_is_a_limit(tmp_path: Path) -> None:
    interface = Interface({}, odd.presents_cut)
    exported(interface, tmp_path)
    session, text = session_of(tmp_path), prompt(LENGTH)
    assert session.manifest.context_length == odd.KEPT
    *_, last = runs(session, [text[:9], *([x] for x in text[9:])], 9)
    assert_source(interface, tmp_path, text, last)
    with pytest.raises(PromptError, match=f"context has {odd.KEPT}"):
        session.generate(text, odd.KEPT)


@pytest.mark.parametrize(
    ("interface", "reason"),
    [
        (Interface({}, odd.an_input_that_nobody_knows), r"input gain \[\] float32"),
        (Interface({}, odd.a_mask_for_each_row_unused), "attention_mask_4d .* a mask for each row"),
        (Interface({"batch": 2}), "its batch is fixed at 2"),
        (Interface({}, odd.all_sizes_fixed), "its number of new tokens is fixed at 16"),
        (Interface({}, odd.transposed_logits), r"logits \[batch,83,length\] is not \[batch, leng"),
        (Interface({}, odd.logits_by_length), r"logits \[length,batch,83\] is not"),
        (Interface({}, odd.chosen_tokens), "logits holds int64, not a number"),
    ],
)
def test_what_cannot_be_fed_is_said_at_the_export(
    interface: Interface, reason: str, tmp_path: Path
) -> None:
    report = exported(interface, tmp_path)
    assert any("trianglemix-run cannot run" in line for line in report.warnings)
    assert Manifest.load(tmp_path / "out").runtime != RUNS
    with pytest.raises(FolderError, match=reason):
        session_of(tmp_path)


@pytest.mark.parametrize("pattern", [KEEP_ALL, PatternRequest(sink=2, window=5, last=3)])
def test_fixed_sizes_are_verified_in_one_call(pattern: PatternRequest, tmp_path: Path) -> None:
    """The dense form is, so that nothing is dropped whatever the pattern."""
    interface = Interface({}, odd.all_sizes_fixed)
    report = exported(interface, tmp_path, pattern=pattern, verify=True)
    (check,) = report.verification
    assert check.passed
    assert check.tokens == 16
    assert [note for note in report.notes if "compared in one call of these sizes" in note]


def test_logits_of_one_row_are_verified(tmp_path: Path) -> None:
    small = PatternRequest(sink=2, window=5, last=3)
    interface = Interface({}, odd.logits_of_one_row)
    report = exported(interface, tmp_path, pattern=small, verify=True)
    assert all(check.passed for check in report.verification)


def test_a_pattern_that_drops_nothing_that_can_be_read_is_no_error(tmp_path: Path) -> None:
    report = exported(Interface({}), tmp_path, pattern=KEEP_ALL, verify=True)
    assert all(check.passed for check in report.verification)
    assert [note for note in report.notes if "kernel and function body were not compared" in note]


def test_logits_without_rows_are_not_verified(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"verification: .*vocabulary.*leave --verify out"):
        exported(Interface({}, odd.transposed_logits), tmp_path, verify=True)


def test_an_unknown_input_is_not_verified(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"verification: .*input gain .*leave --verify out"):
        exported(Interface({}, odd.an_input_that_nobody_knows), tmp_path, verify=True)
