"""The ``ciuic`` command: what it prints, and one sentence instead of a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import ciuic_hf
from ciuic_hf.cli.main import main
from ciuic_hf.demo import bf16_path
from ciuic_kernels.attention import MAX_QUERIES


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    config = ciuic_hf.CiuicConfig(bits=4.25, modules={"lm_head": "raw"})
    model = AutoModelForCausalLM.from_pretrained(
        bf16_path(), dtype=torch.bfloat16, quantization_config=config
    )
    model.save_pretrained(path)
    return path


def test_inspect_agrees_with_the_report_of_the_load(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(saved), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    loaded = AutoModelForCausalLM.from_pretrained(saved).ciuic_report.to_dict()
    for key in ("nbytes", "dense_nbytes", "bits_per_weight"):
        assert shown[key] == loaded[key]
    for part in ("compressed", "kept"):
        by_name = [sorted(report[part], key=lambda entry: entry["name"]) for report in (shown, loaded)]
        assert json.loads(json.dumps(by_name[1])) == by_name[0]


def test_inspect_prints_a_table(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(saved)]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("experts", "attention", "lm_head", "vectors", "total", "smaller"))


def test_dispatch_shows_attention_to_a_compressed_cache(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the checkpoint has cache bits; the demo caches latents."""
    command = ["inspect", str(tmp_path), "--dispatch", "--gpu", "H100"]
    for file in saved.iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert main([*command, "--json"]) == 0
    assert "attention" not in json.loads(capsys.readouterr().out)
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["cache_bits"] = 4
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main([*command, "--json"]) == 0
    ((name, (*served, last)),) = json.loads(capsys.readouterr().out)["attention"].items()
    assert name.startswith("attention") and f"latents of {config['kv_lora_rank']} + " in name
    assert {route["kernel"] for route in served} == {"attention.latents"} and served[-1][
        "last"
    ] == MAX_QUERIES
    assert (last["kernel"], last["first"]) == ("torch tiles", MAX_QUERIES + 1)
    assert main(command) == 0
    assert "torch tiles" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["nothing here", "an empty folder", "not compressed"])
def test_inspect_of_something_else(given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bf16_path() if given == "not compressed" else tmp_path / ("x" if given == "nothing here" else "")
    assert main(["inspect", str(path)]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("ciuic: ") and ("is not a model" in error or "not compressed" in error)
    assert "Traceback" not in error


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compres"])
    assert "demo" in capsys.readouterr().err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"ciuic-hf {ciuic_hf.__version__}\n")


@pytest.mark.parametrize(
    "command",
    [["plan", "SRC", "--bits", "4"], ["compress", "SRC", "DST"], ["calibrate", "SRC", "--save", "DST"]],
)
@pytest.mark.parametrize("kind", ["BertModel", "T5ForConditionalGeneration"])
def test_a_model_that_writes_no_text(
    kind: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What AutoModelForCausalLM would make of an encoder has a head that no file holds."""
    cls = getattr(transformers, kind)
    bert = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    t5 = {"d_model": 64, "d_ff": 64, "d_kv": 32, "num_layers": 1, "num_heads": 2}
    config = cls.config_class(vocab_size=64, **(bert if kind == "BertModel" else t5))
    cls(config).save_pretrained(tmp_path / "SRC")
    assert main([str(tmp_path / word) if word.isupper() else word for word in command]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert f"SRC is a {kind}, and this command is for models that write text from left to right" in error
    assert "Traceback" not in error and not (tmp_path / "DST").exists()


def test_what_cannot_be_calibrated_is_refused_at_once(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source, message in (
        (tmp_path / "x", "is not the directory of a model"),
        (saved, "compressed by Ciuic"),
    ):
        assert main(["calibrate", str(source), "--save", str(tmp_path / "file")]) == 1
        assert message in " ".join(capsys.readouterr().err.split())
