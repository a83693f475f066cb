"""``ciuic plan --train lora`` and ``--cache-bits auto``: what they say holds when it is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ciuic_hf.cli.main import main
from ciuic_hf.demo.published import write_headers


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_headers("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_headers("deepseek-ai/DeepSeek-V2-Lite", tmp_path_factory.mktemp("lite"))


def plan(path: Path, capsys: pytest.CaptureFixture[str], *options: str, status: int = 0) -> Any:
    assert main(["plan", str(path), *options, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def train(path: Path, capsys: pytest.CaptureFixture[str], *options: str, status: int = 0) -> Any:
    return plan(path, capsys, "--train", "lora", *options, status=status)


def test_limits_are_the_last_that_fit(qwen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--memory", "24GB", "--targets", "all-linear", "--checkpointing"]
    found = train(qwen, capsys, *given, "--batch", "2")
    row = found["alternatives"][0]
    assert found["fits"] and found["nbytes"] == sum(found["budget"].values()) == row["nbytes"]
    most = row["largest_batch"]
    assert train(qwen, capsys, *given, "--batch", str(most))["fits"]
    assert not train(qwen, capsys, *given, "--batch", str(most + 1), status=1)["fits"]
    longest = str(row["longest_sequence"])
    assert train(qwen, capsys, *given, "--batch", "2", "--seq", longest)["fits"]


def test_what_is_too_large_names_ways_that_work(qwen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--memory", "12GB", "--batch", "4", "--seq", "1024"]
    found = train(qwen, capsys, *given, status=1)
    ways = [row for row in found["alternatives"] if row["fits"]]
    assert ways and found["nbytes"] > found["memory"]
    for row in ways:
        changed = train(qwen, capsys, *given, *row["choice"].split())
        assert changed["nbytes"] == pytest.approx(row["nbytes"], rel=1e-3)
    assert main(["plan", str(qwen), "--train", "lora", *given]) == 1
    shown = capsys.readouterr()
    assert "does not fit on" in shown.out and "what would fit: --" in " ".join(shown.err.split())


def test_experts_are_planned(lite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = train(lite, capsys, "--targets", "attention,experts", "--rank", "8", "--checkpointing")
    # 27 layers of attention; in 26 of them 64 experts of [2816, 2048] and [2048, 1408]
    attention = (3072 + 2048) + (576 + 2048) + (4096 + 512) + (2048 + 2048)
    experts = 64 * ((2816 + 2048) + (2048 + 1408))
    assert found["adapter_parameters"] == 8 * (27 * attention + 26 * experts)
    assert found["budget"]["optimizer"] == 8 * found["adapter_parameters"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seq", "512"], "add --train lora"),
        (["--train", "lora", "--context", "512"], "use --seq"),
        (["--train", "lora", "--cache-bits", "4"], "generation"),
        (["--train", "lora", "--count", "2", "--gpu", "H100"], "one device"),
        (["--train", "lora", "--targets", "experts"], "Adapters go on"),
        (["--train", "lora", "--batch", "0"], "batch must be"),
        (["--cache-bits", "auto"], "add --gpu or --memory"),
    ],
)
def test_bad_requests_get_a_sentence(
    options: list[str], said: str, qwen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(qwen), *options]) == 1
    assert said in " ".join(capsys.readouterr().err.split())


def test_cache_bits_are_the_most_that_leave_weights_enough(
    qwen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--context", "131072", "--batch", "2", "--prefill-chunk", "none"]
    full = plan(qwen, capsys, *given, "--bits", "4.25")
    for share, expected in ((0, None), (0.25, 8), (0.6, 4)):
        memory = str(full["nbytes"] - int(share * full["budget"]["cache"]))
        found = plan(qwen, capsys, *given, "--memory", memory, "--cache-bits", "auto")
        assert found["cache_bits"] == expected and found["bits"] >= 4
        assert ("in full" if expected is None else f"{expected} bits") in found["cache_choice"]
    assert main(["plan", str(qwen), *given, "--memory", "4GB", "--cache-bits", "auto"]) == 1
    assert "Does not fit" in " ".join(capsys.readouterr().err.split())
