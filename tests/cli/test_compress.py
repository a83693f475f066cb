"""``ciuic compress``: options, what is printed, exit statuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ciuic_hf.cli.main import main
from ciuic_hf.demo import fp8_path
from ciuic_hf.inspection import inspect_checkpoint
from ciuic_hf.shards import ShardFiles


def stop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the fifth write."""
    original, writes = ShardFiles.write, []

    def interrupted(self: ShardFiles, *args: Any) -> None:
        writes.append(args)
        if len(writes) == 5:
            raise KeyboardInterrupt
        original(self, *args)

    monkeypatch.setattr(ShardFiles, "write", interrupted)


def words(text: str) -> str:
    return " ".join(text.split())


def test_options_reach_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "small"
    options = [
        "--bits",
        "3",
        "--modules",
        "attention=6",
        "--modules",
        "lm_head=raw",
        "--max-shard-size",
        "1MB",
        "--cache-bits",
        "4",
    ]
    assert main(["compress", str(fp8_path()), str(out), *options]) == 0
    printed = capsys.readouterr()
    assert "Compressed in" in printed.out and f"{out} is ready" in words(printed.out)
    assert "Writing 2.6 MiB into 3 files." in printed.err
    saved = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (saved["bits"], saved["modules"]) == (3.0, {"attention": 6.0, "lm_head": "raw"})
    assert saved["cache_bits"] == 4
    assert inspect_checkpoint(out).bits_per_weight(["attention"]) == pytest.approx(6, abs=0.02)


@pytest.mark.parametrize("size", [["--memory", "64MiB", "--context", "64"], ["--gpu", "h100"]])
def test_a_memory_budget(size: list[str], tmp_path: Path) -> None:
    assert main(["compress", str(fp8_path()), str(tmp_path / "small"), *size]) == 0
    saved = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert saved["bits"] > 8  # a model this small gets all it can use


def test_a_plan(tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "small"
    assert main(["plan", str(fp8_path()), "--bits", "3.5", "--save", str(plan)]) == 0
    assert main(["compress", str(fp8_path()), str(out), "--plan", str(plan)]) == 0
    nbytes = sum(p.nbytes for p in inspect_checkpoint(out).compressed)
    assert nbytes == json.loads(plan.read_text())["nbytes"]


def test_an_interrupt_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["compress", str(fp8_path()), str(tmp_path / "small")]
    with monkeypatch.context() as patched:
        stop_once(patched)
        assert main(command) == 130
    assert (
        "small.ciuic-unfinished holds what is finished; the same command goes on" in capsys.readouterr().err
    )
    assert main(command) == 0
    assert "are there from before." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "4", "--memory", "1GiB"], "--bits and --memory both say how large"),
        (["--context", "64"], "belong to --memory or --gpu"),
        (["--gpu", "H0"], "No card is named 'H0'"),
        (["--modules", "attention"], "--modules takes WHICH=SETTING, such as attention=6"),
        (["--modules", "attention=99"], "must be between 1 and 16"),
        (
            ["--max-shard-size", "much"],
            "max_shard_size must be a size such as 50GB",
        ),
        (["--policy", "best"], "policy must be one of"),
    ],
)
def test_a_bad_option(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(fp8_path()), str(tmp_path / "small"), *options]) == 1
    assert message in words(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
