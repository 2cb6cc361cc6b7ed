"""Padding, holes and prompt lengths: which keys a row of an exported model may see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from trianglemix.exporter.patterns.softmax import PATTERN

from tests.exporter.exports import Session, assert_close, export_to, random_ids, save_example
from tests.exporter.odd_models import WINDOW, every_second_windowed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lengths")
    path = save_example(PATTERN.example().model, root / "source")
    export_to(path, root / "out", layers=(0, 2))
    return root / "out"


@pytest.fixture(scope="module", params=[True, False], ids=["kernel", "function"])
def session(folder: Path, request: pytest.FixtureRequest) -> Session:
    return Session.of(folder, kernel=request.param)


def test_left_padded_rows_equal_each_row_alone(session: Session) -> None:
    ids = random_ids(3, 30)
    mask = np.ones_like(ids)
    mask[1, :5] = 0
    mask[2, :19] = 0
    together = session.logits(ids, mask)
    for row, pads in enumerate((0, 5, 19)):
        alone = session.logits(ids[row : row + 1, pads:])
        assert_close(together[row : row + 1, pads:], alone)


def test_left_padding_holds_through_a_decode_step(session: Session) -> None:
    ids = random_ids(2, 31)
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    first = session.run(ids[:, :30], mask[:, :30])
    step = session.logits(ids[:, 30:], mask, past=session.carried(first))
    alone = session.run(ids[1:, 4:30])
    expected = session.logits(ids[1:, 30:], np.ones((1, 27), int), past=session.carried(alone))
    assert_close(step[1:], expected)


def test_right_padded_first_call_is_right_for_real_rows(session: Session) -> None:
    ids = random_ids(2, 30)
    mask = np.ones_like(ids)
    mask[1, 21:] = 0
    together = session.logits(ids, mask)
    assert_close(together[:1], session.logits(ids[:1]))
    assert_close(together[1:, :21], session.logits(ids[1:, :21]))


def test_a_row_of_pads_only_is_finite(session: Session) -> None:
    ids = random_ids(2, 20)
    mask = np.ones_like(ids)
    mask[1] = 0
    together = session.logits(ids, mask)
    assert np.isfinite(together).all()
    assert_close(together[:1], session.logits(ids[:1]))


@pytest.mark.parametrize("hole", [slice(7, 9), slice(19, 20)])
def test_a_mask_with_a_hole_is_never_silent(folder: Path, hole: slice) -> None:
    ids = random_ids(2, 24)
    mask = np.ones_like(ids)
    mask[1, hole] = 0
    with pytest.raises(Exception, match="seqlens_k"):
        Session.of(folder, kernel=True).logits(ids, mask)
    fallback = Session.of(folder, kernel=False).logits(ids, mask)
    assert np.isnan(fallback[1]).all()
    assert np.isfinite(fallback[0]).all()


@pytest.mark.parametrize("told", [[0], [-3], [0, 0]])
def test_prompt_length_of_zero_or_less_means_the_end(session: Session, told: list[int]) -> None:
    ids = random_ids(2, 30)
    np.testing.assert_array_equal(session.logits(ids, prompt_length=told), session.logits(ids))


def test_prompt_length_moves_the_dense_rows(session: Session) -> None:
    """Told that the prompt goes on, the last rows of this call are not the dense ones."""
    ids = random_ids(2, 30)
    end, later = session.logits(ids), session.logits(ids, prompt_length=[90, 90])
    assert_close(later[:, :11], end[:, :11])
    assert np.abs(later - end)[:, -1].max() > 1e-3
    one_value = session.logits(ids, prompt_length=[90])
    np.testing.assert_array_equal(one_value, later)
    mixed = session.logits(ids, prompt_length=[90, 0])
    assert_close(mixed, np.stack([later[0], end[1]]))


def test_a_default_that_went_into_the_operator_is_no_input_any_more(tmp_path: Path) -> None:
    """Left in place, another window could be given and would be heard by nobody."""
    model = every_second_windowed().model
    windows = [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and value.const_value.size == 1
        and value.const_value.numpy() == WINDOW
        and any(node.op_type == "GreaterOrEqual" for node in value.consumers())
    ]
    assert windows
    model.graph.inputs.extend(windows)
    path = save_example(model, tmp_path / "source")
    export_to(path, tmp_path / "out", layers=(1,))
    inputs = ir.load(tmp_path / "out" / "model.onnx").graph.inputs
    assert not {value.name for value in windows} & {value.name for value in inputs}
