"""The reproduced headers of official checkpoints, against what the hub states of them; and plans of the real sizes."""

from __future__ import annotations

import io
import json
import math
import time
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from ciuic_hf.cli.main import main
from ciuic_hf.cli.plan_screen import show
from ciuic_hf.demo.published import CONFIGS, tensors_of, write_headers

PREFIX = "deepseek-ai/DeepSeek-"
# Weights by dtype, as the hub's page of each repository counts them.
COUNTS: dict[str, dict[str, int]] = {
    "V2-Lite": {"BF16": 15_706_484_224},
    "V2": {"BF16": 235_741_434_880},
    "V3": {"BF16": 3_918_786_560, "F8_E4M3": 680_571_043_840, "F32": 41_555_600},
    "R1": {"BF16": 3_918_786_560, "F8_E4M3": 680_571_043_840, "F32": 41_555_600},
    "R1-Distill-Qwen-1.5B": {"BF16": 1_777_088_000},
    "R1-Distill-Qwen-7B": {"BF16": 7_615_616_512},
    "R1-Distill-Qwen-14B": {"BF16": 14_770_033_664},
    "R1-Distill-Qwen-32B": {"BF16": 32_763_876_352},
    "R1-Distill-Llama-8B": {"BF16": 8_030_261_248},
    "R1-Distill-Llama-70B": {"BF16": 70_553_706_496},
}


def counted(name: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for _, dtype, shape in tensors_of(PREFIX + name):
        total[dtype] += math.prod(shape)
    return total


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_those_of_the_hub(name: str) -> None:
    assert counted(name) == COUNTS[name]


def test_v32_has_as_many_weights_as_the_hub_says() -> None:
    """Only their sum is known for certain."""
    assert counted("V3.2-Exp").total() == 685_396_921_376


@pytest.mark.parametrize("name", ["V2-Lite", "V2", "V3.2-Exp", "R1-Distill-Qwen-7B", "R1-Distill-Llama-70B"])
def test_the_headers_fit_the_models_of_transformers(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ciuic plan` checks every name and shape against the model that transformers builds from the config."""
    path = write_headers(PREFIX + name, tmp_path)
    assert main(["plan", str(path), "--bits", "4.25", "--context", "2048", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bits"] == pytest.approx(4.25, abs=0.01)
    assert found["files"]["dtypes"].keys() == counted(name).keys()


def test_671_billion_weights_are_planned_in_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From 92,000 headers, on eight cards, in processor time, as others use this machine."""
    path = write_headers(f"{PREFIX}V3", tmp_path)
    started = time.process_time()
    options = ["--gpu", "H100", "--count", "8", "--context", "8192"]
    assert main(["plan", str(path), *options, "--json"]) == 0
    assert time.process_time() - started < 10
    found = json.loads(capsys.readouterr().out)
    assert sum(role["weights"] for role in found["roles"].values()) > 670e9
    assert 0.995 * found["memory"] < found["nbytes"] <= found["memory"]
    assert found["longest_context"] >= 8192 and found["largest_batch"] == 1
    assert set(found["device_map"].values()) == set(range(8))
    assert "model.layers.60" in found["device_map"] and "lm_head" in found["device_map"]
    console = Console(width=100, color_system=None, file=io.StringIO())
    with console.capture() as capture:
        show(found, console)
    text = capture.get()
    assert len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 100
    for part in (
        "fits on 8 x H100",
        "641 GiB in",
        "Quality",
        "tokens/s",
        "Layers on each device",
        "1 bit less",
    ):
        assert part in text


def test_more_of_the_same_card_are_offered_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_headers(f"{PREFIX}R1-Distill-Llama-70B", tmp_path)
    assert main(["plan", str(path), "--gpu", "RTX3090", "--context", "65536"]) == 1
    assert "or 2 x RTX3090, or 1 x L40S, or 2 x RTX4090." in " ".join(capsys.readouterr().err.split())


def test_every_configuration_is_planned_somewhere() -> None:
    assert {PREFIX + name for name in (*COUNTS, "V3.2-Exp")} == set(CONFIGS)
