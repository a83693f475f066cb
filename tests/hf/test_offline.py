"""``compress_checkpoint`` writes the files that ``from_pretrained`` and ``save_pretrained`` write, byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ciuic_hf import CiuicConfig, CiuicError
from ciuic_hf.hf.choosing import choose
from ciuic_hf.hf.offline import Progress, compress_checkpoint
from ciuic_hf.shards import lay_out

Snapshot = Callable[[Path], dict[str, bytes]]
FAMILIES = (
    "qwen2_tied",
    "llama_untied",
    "gpt_neox",
    "qwen3_moe",
    "deepseek_v32",
    "v3_bf16",
    "v3_fp8",
    "v3_mtp",
    "v3_fused",
)


def by_loading(source: Path, out: Path, config: CiuicConfig, max_shard_size: str = "50GB") -> None:
    """The checkpoint that loading and saving make."""
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model.save_pretrained(out, max_shard_size=max_shard_size)


def assert_same(
    source: Path, tmp_path: Path, config: CiuicConfig, snapshot: Snapshot, size: str = "50GB"
) -> dict[str, bytes]:
    """Compress both ways and compare every file."""
    by_loading(source, tmp_path / "loaded" / "model", config, size)
    compress_checkpoint(source, tmp_path / "offline" / "model", config, max_shard_size=size)
    loaded, offline = (snapshot(tmp_path / way / "model") for way in ("loaded", "offline"))
    assert loaded.keys() == offline.keys()
    assert [name for name in loaded if loaded[name] != offline[name]] == []
    assert [entry.name for entry in (tmp_path / "offline").iterdir()] == ["model"]
    return offline


@pytest.mark.parametrize("name", FAMILIES)
def test_same_bytes(name: str, checkpoint: Callable[[str], Path], tmp_path: Path, snapshot: Snapshot) -> None:
    files = assert_same(checkpoint(name), tmp_path, CiuicConfig(bits=4.25), snapshot, "60KB")
    assert "model.safetensors.index.json" in files


@pytest.mark.parametrize(
    "config",
    [
        {"bits": 3, "policy": "uniform"},
        {"bits": 5, "modules": {"experts": "raw", "lm_head": "raw", "attention": "sparse"}},
        {"memory": "64MiB", "context": 64},
    ],
    ids=["uniform", "modules", "memory"],
)
def test_same_bytes_with_other_settings(
    config: dict[str, Any], checkpoint: Callable[[str], Path], tmp_path: Path, snapshot: Snapshot
) -> None:
    assert_same(checkpoint("v3_fp8"), tmp_path, CiuicConfig(**config), snapshot)


def test_a_plan_is_followed(checkpoint: Callable[[str], Path], tmp_path: Path, snapshot: Snapshot) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint("v3_bf16")))
    choose(model, CiuicConfig(bits=3.5)).plan({}).save(tmp_path / "plan.json")
    assert_same(checkpoint("v3_bf16"), tmp_path, CiuicConfig(plan=tmp_path / "plan.json"), snapshot)


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_weight_that_the_files_hold_twice(
    equal: bool, checkpoint: Callable[[str], Path], tmp_path: Path, snapshot: Snapshot
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("qwen2_tied"), source)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    file = source / index["weight_map"]["model.embed_tokens.weight"]
    tensors = load_file(file)
    head = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"] = head if equal else head.flip(0).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    index["weight_map"]["lm_head.weight"] = file.name
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    files = assert_same(source, tmp_path, CiuicConfig(bits=4.25), snapshot)
    assert (b'"lm_head.weight"' in files["model.safetensors"][:2000]) == (not equal)


def test_companions_come_along(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("v3_bf16"), source)
    for name in ("tokenizer.json", "LICENSE", "README.md", "notes.txt", "pytorch_model.bin"):
        (source / name).write_text(name)
    compress_checkpoint(source, tmp_path / "out", CiuicConfig())
    made = {entry.name for entry in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "LICENSE"} <= made and not {"notes.txt", "pytorch_model.bin"} & made
    assert "ciuic" in (tmp_path / "out" / "README.md").read_text()


def test_the_report_is_that_of_a_load(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    report = compress_checkpoint(checkpoint("v3_fp8"), tmp_path / "out", CiuicConfig(bits=4.25))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").ciuic_report
    assert (report.nbytes, report.dense_nbytes) == (loaded.nbytes, loaded.dense_nbytes)
    assert report.compressed == loaded.compressed
    assert str(report).endswith("mapped files).") and "Compressed in" in str(report)


def test_progress_ends_at_all_bytes(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    seen: list[Progress] = []
    compress_checkpoint(checkpoint("v3_bf16"), tmp_path / "out", CiuicConfig(), on_progress=seen.append)
    written = [progress.written for progress in seen]
    assert written == sorted(written) and written[0] == 0 and written[-1] == seen[-1].nbytes
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 0 < size - seen[-1].nbytes < 20_000  # the header


def test_a_model_of_the_hub(
    checkpoint: Callable[[str], Path], tmp_path: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(name: str, **_: Any) -> str:
        asked.append(name)
        return str(checkpoint("v3_bf16"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    compress_checkpoint("someone/small-model", tmp_path / "out", CiuicConfig())
    assert asked == ["someone/small-model"]
    assert "base_model: someone/small-model" in (tmp_path / "out" / "README.md").read_text()


def test_a_name_that_the_hub_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise errors.RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CiuicError, match="neither a directory here nor a model on the hub"):
        compress_checkpoint("someone/nothing", tmp_path / "out", CiuicConfig())


DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool)
SHAPES = st.lists(st.integers(0, 5), max_size=3)
NAMES = st.text("abZ_.0é", min_size=1, max_size=6)


@given(st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=8))
def test_headers_are_those_of_safetensors(
    tmp_path_factory: pytest.TempPathFactory, described: dict[str, tuple[list[int], torch.dtype]]
) -> None:
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in described.items()}
    file = tmp_path_factory.mktemp("headers") / "x.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    header, slots = lay_out(file.name, tensors, {"format": "pt"})
    assert file.read_bytes()[: len(header)] == header
    assert max((s.start + s.nbytes for s in slots.values()), default=0) == file.stat().st_size
