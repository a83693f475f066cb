"""Commands about GPUs, on a machine that may have none."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from ciuic_hf.bench.dispatch import MAX_TOKENS, routes
from ciuic_hf.bench.kernels.shapes import STANDARD, WeightShape
from ciuic_hf.cli.main import main
from ciuic_hf.packaged import configs_folder
from ciuic_kernels import tuning
from ciuic_kernels.gpus import GPUS
from ciuic_kernels.selection import DEFAULT_RULES, LINEAR, choose


@pytest.mark.parametrize("command", [["kernels"], ["kernels", "--quick", "--report"], ["tune"]])
def test_without_a_gpu_one_sentence(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["bench", *command]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert f"ciuic bench {command[0]} needs a CUDA GPU" in captured.err


@pytest.mark.parametrize("gpu", GPUS)
def test_every_number_of_tokens_has_one_kernel(gpu: str) -> None:
    for shape in STANDARD[-3:] + tuple(s for s in STANDARD if s.experts):
        found = routes(shape, GPUS[gpu], DEFAULT_RULES)
        assert (found[0].first, found[-1].last) == (1, MAX_TOKENS)
        assert all(b.first == a.last + 1 for a, b in itertools.pairwise(found))
        assert all(route.reason for route in found)


def test_launches_are_those_that_the_kernel_is_started_with() -> None:
    mixed, alone = (WeightShape("w", 4096, 4096, mixed=several) for several in (True, False))
    for shape, kinds in ((mixed, 3), (alone, 1)):
        for route in routes(shape, GPUS["H100"], DEFAULT_RULES):
            launch = choose(LINEAR, route.first, shape.weights, torch.bfloat16, GPUS["H100"]).launch
            if launch is not None:
                launch = launch.of_kinds(kinds)
                assert route.launch.startswith(f"{launch.block_m} tokens, {launch.num_warps} warp")
    assert [r.launch for r in routes(mixed, GPUS["H100"], DEFAULT_RULES)] != [
        r.launch for r in routes(alone, GPUS["H100"], DEFAULT_RULES)
    ]


def test_dispatch_of_a_named_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    tuning.rules_for.cache_clear()
    assert main(["inspect", "--dispatch", "--gpu", "rtx 4090", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["gpu"] == "NVIDIA GeForce RTX 4090" and shown["rules"].startswith("defaults")
    assert len(shown["weights"]) == len(STANDARD)
    kernels = {route["kernel"] for of_weight in shown["weights"].values() for route in of_weight}
    assert kernels == {"linear", "dequantize + GEMM", "experts.few", "experts.many"}
    assert main(["inspect", "--dispatch", "--gpu", "B200"]) == 0
    assert "NVIDIA B200" in capsys.readouterr().out


def test_a_broken_table_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    tuning.user_path().mkdir(parents=True)
    (tuning.user_path() / "broken.json").write_text("{}")
    tuning.rules_for.cache_clear()
    assert main(["inspect", "--dispatch", "--gpu", "H100"]) == 1
    assert "is not a table of launch rules" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dispatch", "--gpu", "K80"], "No GPU is named 'K80'"),
        (["--dispatch", "--device", "cpu"], "about the kernels of CUDA GPUs"),
        (["--dispatch", "--device", "cuda:99"], "cuda:99 is not here"),
        ([], "needs the directory of a checkpoint"),
        (["somewhere", "--gpu", "H100"], "add --dispatch"),
    ],
)
def test_what_inspect_refuses(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *arguments]) == 1
    assert said in " ".join(capsys.readouterr().err.split())


def test_packaged_tables_are_looked_for() -> None:
    import ciuic_hf  # noqa: F401

    assert configs_folder().is_dir()
    assert configs_folder() / "tuned" in tuning.search_paths()
