"""`trianglemix-run`: text on stdout, figures on stderr, one line and an exit code for failures."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trianglemix.custom_ops.library import LIBRARY_NAME
from trianglemix.runtime import TriangleSession

from tests.runtime.conftest import FolderMaker
from tests.runtime.tiny_folder import TinyFolder

COMMAND = [sys.executable, "-m", "trianglemix.runtime.cli"]


def _run(*arguments: object, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, input=text, timeout=120)


def test_text_and_figures(folder: Path, session: TriangleSession, tmp_path: Path) -> None:
    expected = session.generate("A prompt", 9)
    file = tmp_path / "prompt.txt"
    file.write_text("A prompt")
    answer = _run(folder, "--prompt-file", file, "--max-new-tokens", 9, "--prefill-chunk", 3)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == expected.text + "\n"
    assert "8 prompt tokens" in answer.stderr
    assert "native kernel" in answer.stderr
    assert len(answer.stderr.splitlines()) == 1


def test_json_from_stdin_in_the_chat_template(folder: Path, session: TriangleSession) -> None:
    options = ["--chat", "--json", "--max-new-tokens", 6, "--temperature", 0.9, "--seed", 3]
    answer = _run(folder, "--prompt-file", "-", *options, text="hi")
    assert answer.returncode == 0, answer.stderr
    content = json.loads(answer.stdout)
    assert content["prompt_tokens"] == 5  # user, h, i, end, assistant
    assert len(content["ids"]) == 6
    assert content["kernel"] == "native"
    assert {"text", "ttft_s", "tokens_per_s", "peak_rss_mb", "finish_reason"} <= set(content)
    again = _run(folder, "--prompt-file", "-", *options, text="hi")
    assert json.loads(again.stdout)["ids"] == content["ids"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--prompt", "a", "--prompt-file", "-"],
        ["--prompt", "a", "--max-new-tokens", "0"],
        ["--prompt", "a", "--provider", "tpu"],
    ],
)
def test_wrong_usage(folder: Path, arguments: list[str]) -> None:
    answer = _run(folder, *arguments)
    assert answer.returncode == 2
    assert "Traceback" not in answer.stderr
    assert answer.stdout == ""


def test_failures_are_one_line(folder: Path, tmp_path: Path) -> None:
    binary = tmp_path / "prompt.bin"
    binary.write_bytes(b"\xff\xfe\x00")
    reasons: list[str] = []
    for arguments in (
        [tmp_path / "nowhere", "--prompt", "a"],
        [folder, "--prompt", "a" * 600],
        [folder, "--prompt-file", binary],
        [folder, "--prompt", ""],
    ):
        answer = _run(*arguments)
        assert answer.returncode == 1
        assert answer.stderr.startswith("trianglemix-run: error: ")
        assert len(answer.stderr.splitlines()) == 1
        assert answer.stdout == ""
        reasons.append(answer.stderr)
    assert f"{binary} is not text in UTF-8" in reasons[2]
    assert "the prompt is empty" in reasons[3]


def test_interrupted_in_the_middle(make_folder: FolderMaker) -> None:
    endless = make_folder(TinyFolder(context_length=None, position_ids=False))
    command = [*COMMAND, str(endless), "--prompt", "a", "--max-new-tokens", "100000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)  # it is generating
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in errors


def test_interrupted_inside_a_long_step(make_folder: FolderMaker, tmp_path: Path) -> None:
    endless = make_folder(TinyFolder(context_length=None, position_ids=False))
    file = tmp_path / "prompt.txt"
    file.write_text("a" * 150_000)  # tens of seconds in its dense layer, all in native code
    command = [*COMMAND, str(endless), "--prompt-file", str(file), "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while LIBRARY_NAME not in maps.read_text():  # the session is being opened
            time.sleep(0.05)
        time.sleep(2)
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert time.monotonic() - sent < 3
    assert process.returncode == 130
    assert errors == b"\ntrianglemix-run: error: interrupted\n"


def test_a_folder_without_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("tokenizer*"))
    result = _run(copy, "--prompt", "text")
    assert result.returncode == 1
    assert "copy it from the source model" in result.stderr
    assert len(result.stderr.splitlines()) == 1
