"""`trianglemix-analyze` on a tiny model: the plan, its pictures, its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trianglemix.analysis.cli import main
from trianglemix.exporter.errors import PlanError
from trianglemix.exporter.layers.plan import Fingerprint, Plan

from tests.commands import Finished, run_main
from tests.tiny_models import tiny_folder

SMALL = ["--sink", "4", "--window", "32", "--last", "8", "--samples", "2", "--tokens", "700"]


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
