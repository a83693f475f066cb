"""``ciuic inspect`` draws checkpoints and plans, and refuses what it cannot draw in one sentence."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import ciuic_hf
from ciuic_hf.cli.main import main
from ciuic_hf.demo import bf16_path

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "model"
    config = ciuic_hf.CiuicConfig(bits=4.25)
    model = AutoModelForCausalLM.from_pretrained(
        bf16_path(), dtype=torch.bfloat16, quantization_config=config
    )
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    assert main(["plan", str(bf16_path()), "--bits", "3", "--save", str(path)]) == 0
    return path


def test_a_checkpoint_and_a_plan_are_drawn(
    saved: Path, plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, bits in ((saved, "4.2"), (plan, "3.0")):
        assert main(["inspect", str(path), "--png", str(tmp_path / "model.png")]) == 0
        out = capsys.readouterr().out
        assert all(word in out for word in ("experts", "kv_a_proj_with_mqa", "by layer", "predicted error"))
        assert f"◆ {path.name}: {bits}" in out
        assert (tmp_path / "model.png").read_bytes().startswith(PNG)


def test_the_plan_of_a_checkpoint_is_the_checkpoint(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = tmp_path / "same.json"
    main(["plan", str(bf16_path()), "--bits", "4.25", "--save", str(same)])
    capsys.readouterr()
    assert main(["inspect", "--compare", str(saved), str(same), "--json"]) == 0
    total = json.loads(capsys.readouterr().out)["roles"][-1]
    assert total["up"] == total["down"] == 0 and total["nbytes"][0] == total["nbytes"][1]


def test_a_comparison_is_drawn(
    saved: Path, plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = tmp_path / "compare.png"
    assert main(["inspect", "--compare", str(saved), str(plan), "--png", str(png)]) == 0
    out = capsys.readouterr().out
    assert "→" in out and "change of bits" in out and png.read_bytes().startswith(PNG)


def test_a_matrix_is_drawn(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "matrix.png"
    arguments = ["inspect", str(saved), "--matrix", "layers.1.mlp.experts.down_proj", "--png", str(png)]
    assert main([*arguments, "--expert", "2"]) == 0
    out = capsys.readouterr().out
    assert "expert 2 of 12" in out and "% of the blocks" in out and png.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "needs the directory"),
        (["{saved}", "--compare", "a", "b"], "takes both paths itself"),
        (["{saved}", "--expert", "1"], "add --matrix NAME"),
        (["{saved}", "--matrix", "down_proj"], "name one"),
        (["{saved}", "--matrix", "down_proj", "--json"], "leave --sensitivity and --json out"),
        (["--dispatch", "--png", "x.png"], "table of kernels"),
        (["{saved}/config.json"], "is not a plan"),
        (["{saved}/model.safetensors"], "neither the directory of a checkpoint nor a plan.json"),
    ],
)
def test_what_cannot_be_drawn(
    arguments: list[str], sentence: str, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *(a.format(saved=saved) for a in arguments)]) == 1
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_without_matplotlib_one_sentence(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert main(["inspect", str(saved), "--png", "x.png"]) == 1
    assert "pip install 'ciuic-hf[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "shape", [None, [0, 5], "abc", [64, -1], [10**12, 10**12], [1, 2, 3, 4], [True, 2.5]]
)
def test_a_hostile_config_is_refused(
    shape: Any, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((saved / "config.json").read_text())
    name = next(iter(config["quantization_config"]["parameters"]))
    config["quantization_config"]["parameters"][name]["shape"] = shape
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(tmp_path)]) == 1
    assert name in " ".join(capsys.readouterr().err.split()).replace(" ", "") or shape


def test_names_cannot_command_the_terminal(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((saved / "config.json").read_text())
    for entry in config["quantization_config"]["parameters"].values():
        entry["role"] = "[/red]\x1b[2J"
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(tmp_path)]) == 0
    assert "\x1b" not in capsys.readouterr().out
