"""`trianglemix-analyze` on a tiny model: the plan, its pictures, its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trianglemix.analysis import block_select
from trianglemix.analysis.block_probe import BlockProbe
from trianglemix.analysis.cli import main
from trianglemix.exporter.errors import PlanError
from trianglemix.exporter.layers.block_sparse_plan import BlockSparsePlan
from trianglemix.exporter.layers.plan import Fingerprint, Plan

from tests.commands import Finished, run_main
from tests.tiny_models import tiny_folder

SMALL = ["--sink", "4", "--window", "32", "--last", "8", "--samples", "2", "--tokens", "700"]

BLOCKS = ["--check-samples", "0", "--lengths", "1200,1800", "--masses", "0.5,0.85"]
BLOCKS += ["--block-samples", "1"]


def _analyze(*arguments: str | Path) -> Finished:
    return run_main(main, *arguments)


def test_a_plan_is_measured_checked_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: no pictures to test")
    output = tmp_path / "plan.json"
    check = ["--check-samples", "2", "--check-tokens", "700", "--max-loss", "5"]
    result = _analyze(tiny_folder("qwen3"), "-o", output, *SMALL, *check)
    assert result.code == 0, result.err
    plan = Plan.load(output)
    assert sorted(plan.layers_by_importance) == [0, 1, 2]
    assert plan.layers_by_importance[0] == 2, "only the last row of the last layer matters"
    assert plan.triangle_layers
    assert plan.figures["check"]["verdict"] == "blind"  # random weights know no answer
    assert plan.figures["probe"]["pattern"]["sliding_window_size"] == 32
    plan.check_fits(plan.fingerprint)
    with pytest.raises(PlanError, match="head_size"):
        plan.check_fits(Fingerprint(3, 4, 2, 64))
    page = output.with_suffix(".html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page
    for picture in ("gradients", "mask", "accuracy"):
        assert output.with_suffix(f".{picture}.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def diffuse_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights look everywhere: layers may keep nearly all of their blocks."""
    monkeypatch.setattr(block_select, "MOST_KEPT", 0.99)


@pytest.mark.usefixtures("diffuse_heads")
def test_block_sparse_layers_are_measured_on_top_of_a_plan(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: no pictures to test")
    start, output = tmp_path / "start.json", tmp_path / "plan.json"
    shape = Fingerprint(3, 4, 2, 16)
    Plan("tiny", shape, triangle_layers=(2,), origin="by hand").save(start)
    data = tmp_path / "data.jsonl"
    text = " ".join(str(number * 7919 % 1009) for number in range(1500))
    data.write_text("".join(json.dumps({"prompt": text, "answer": "a"}) + "\n" for _ in "ab"))
    arguments = ["--block-sparse", "--plan", start, "-o", output, "--data", data, *BLOCKS]
    result = _analyze(tiny_folder("llama"), *arguments)
    assert result.code == 0, result.err
    plan = Plan.load(output)
    assert (plan.triangle_layers, plan.origin) == ((2,), "by hand")
    section = plan.block_sparse
    assert section is not None
    assert set(section.layers) <= {0, 1}
    assert (section.rule.mass, section.rule.min_length) == (0.85, 1050)
    assert sorted(section.densities) == [1200, 1800]
    assert "not checked" in section.origin
    page = output.with_suffix(".html").read_text(encoding="utf-8")
    assert "--block-sparse-layers" in page
    assert page.count("data:image/png;base64,") == 3
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(BlockProbe, "__call__", None)  # what was measured is not measured again
        assert _analyze(tiny_folder("llama"), *arguments).code == 0


@pytest.mark.usefixtures("diffuse_heads")
def test_layers_that_a_plan_only_ranks_are_triangle_layers(tmp_path: Path) -> None:
    start, output = tmp_path / "start.json", tmp_path / "plan.json"
    Plan("tiny", Fingerprint(3, 4, 2, 16), layers_by_importance=(2,)).save(start)
    given = ["--block-sparse", "--plan", start, "-o", output, "--no-plots", *BLOCKS]
    result = _analyze(tiny_folder("llama"), *given)
    assert result.code == 0, result.err
    section = Plan.load(output).block_sparse
    assert section is not None
    assert sorted(section.densities[1200]) == [0, 1]


@pytest.mark.usefixtures("diffuse_heads")
def test_an_unproved_choice_of_block_sparse_layers_is_not_written(tmp_path: Path) -> None:
    start, output = tmp_path / "start.json", tmp_path / "plan.json"
    older = BlockSparsePlan((0, 1), origin="of another day")
    Plan("tiny", Fingerprint(3, 4, 2, 16), triangle_layers=(2,), block_sparse=older).save(start)
    check = ["--check-samples", "2", "--check-tokens", "1100", "--no-plots", *BLOCKS[2:]]
    result = _analyze(tiny_folder("qwen3"), "--block-sparse", "--plan", start, "-o", output, *check)
    assert result.code == 1
    assert "does not tell random blocks from the rule's" in result.err
    assert Plan.load(output).block_sparse is None
    assert Plan.load(start).block_sparse == older


def test_a_plan_is_for_block_sparse_alone(tmp_path: Path) -> None:
    output = ["-o", tmp_path / "plan.json", "--no-plots"]
    for arguments, words in (
        (["--plan", "p.json"], "--plan is for --block-sparse"),
        (["--plan", "p.json", "--block-sparse", "--threshold", "0.5"], "has its triangle layers"),
        (["--block-sparse", "--lengths", "many"], "no list of numbers"),
        (["--block-sparse", "--lengths", "16000"], "up to 14000 tokens stay dense"),
    ):
        result = _analyze(tiny_folder("llama"), *output, *arguments)
        assert result.code == 2
        assert words in result.err


def test_a_users_own_data_and_a_number_of_layers(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    text = "the house is by the sea " * 12
    data.write_text("".join(json.dumps({"prompt": text, "answer": a}) + "\n" for a in "ab"))
    output = tmp_path / "plan.json"
    rest = ["--data", data, "--no-plots", "--check-samples", "0", "--num-triangle-layers", "2"]
    result = _analyze(tiny_folder("llama"), "-o", output, *SMALL, *rest)
    assert result.code == 0, result.err
    assert len(Plan.load(output).triangle_layers) == 2
    assert not output.with_suffix(".html").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--num-triangle-layers", "9"], "3 layers"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--window", "4000"], "no Middle section"),
        (["--tokens", "5000"], "the model's context is 2048"),
        (["--device", "nowhere"], "cannot go to the device 'nowhere'"),
        (["-o", "plan.html"], "name a .json file"),
        (["-o", "/proc/plan.json"], "cannot be written"),
    ],
)
def test_refusals_are_one_line(tmp_path: Path, arguments: list[str], reason: str) -> None:
    fixed = ["--no-plots", "--check-samples", "0", *SMALL, *arguments]
    result = _analyze(tiny_folder("llama"), "-o", tmp_path / "plan.json", *fixed)
    assert result.code == 1
    assert reason in result.err.splitlines()[-1]
    assert "Traceback" not in result.err
    assert not (tmp_path / "plan.json").exists()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    result = _analyze(tmp_path, "-o", tmp_path / "plan.json", "--no-plots")
    assert result.code == 1
    assert "tokenizer.json" in result.err
