"""Compressed checkpoints that do not add up are refused before anything is computed with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ciuic_hf import CiuicError

NAME = "model.layers.1.mlp.experts.gate_up_proj"
LINEAR = "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture
def home(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A compressed checkpoint that may be damaged."""
    return shutil.copytree(saved("v3_fp8"), tmp_path / "model")


def change_tensor(home: Path, name: str, change: Callable[[Tensor], Tensor] | None) -> None:
    """Rewrite one tensor in its shard; None removes it."""
    for file in home.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensor = tensors.pop(name)
            if change is not None:
                tensors[name] = change(tensor.clone()).contiguous()
            save_file(tensors, file, metadata={"format": "pt"})


def change_config(home: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite quantization_config."""
    config = json.loads((home / "config.json").read_text())
    change(config["quantization_config"])
    (home / "config.json").write_text(json.dumps(config))


def first_tag(value: int, byte: int) -> Callable[[Tensor], Tensor]:
    """Set the codec id (byte 0) or the exponent (byte 1) of the first block."""

    def change(tags: Tensor) -> Tensor:
        tags.view(-1, 2)[0, byte] = value
        return tags

    return change


@pytest.mark.parametrize("name", [NAME, LINEAR])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (first_tag(250, 0), "250 is not a codec"),
        (first_tag(0, 0), "describe"),
        (first_tag(1, 0), "describe"),
        (first_tag(255, 1), "exponent 255"),
        (lambda tags: tags.flatten(), "belong to different checkpoints"),
        (lambda tags: tags.to(torch.int32), "belong to different checkpoints"),
        (lambda tags: tags[..., :1, :, :], "belong to different checkpoints"),
    ],
)
def test_tags(
    name: str, change: Callable[[Tensor], Tensor], words: str, home: Path, load: Callable[..., Any]
) -> None:
    change_tensor(home, f"{name}_tags", change)
    with pytest.raises(CiuicError) as caught:
        load(home)
    assert words in str(caught.value)
    assert name.rpartition(".")[0] in str(caught.value)


@pytest.mark.parametrize("name", [NAME, LINEAR])
@pytest.mark.parametrize(
    "change",
    [lambda a: a[:-16], lambda a: torch.cat([a, a[:16]]), lambda a: a.view(1, -1), lambda a: a.float()],
)
def test_arena(name: str, change: Callable[[Tensor], Tensor], home: Path, load: Callable[..., Any]) -> None:
    change_tensor(home, name, change)
    with pytest.raises(CiuicError, match=rf"{name}.*arena.*belong to different checkpoints"):
        load(home)


@pytest.mark.parametrize("name", [NAME, f"{NAME}_tags", LINEAR, f"{LINEAR}_tags"])
def test_tensor_missing(name: str, home: Path, load: Callable[..., Any]) -> None:
    change_tensor(home, name, None)
    with pytest.raises(CiuicError) as caught:
        load(home)
    assert name in str(caught.value) and "missing" in str(caught.value)


def test_version_from_the_future(home: Path, load: Callable[..., Any]) -> None:
    change_config(home, lambda config: config.update(format_version=2))
    with pytest.raises(CiuicError, match=r"format version 2.*reads up to 1.*upgrade ciuic-hf"):
        load(home)


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"shape": [4, 144, 144]},
        {"shape": [4, 144, -144], "arena_nbytes": 10},
        {"shape": "all", "arena_nbytes": 10},
        {"shape": [144], "arena_nbytes": 10},
        {"shape": [4, 144, 144], "arena_nbytes": -1},
        {"shape": [4, 144, 144.5], "arena_nbytes": 48000},
        {"shape": [True, 144, 144], "arena_nbytes": 48000},
    ],
)
def test_config_entry(entry: dict[str, Any], home: Path, load: Callable[..., Any]) -> None:
    change_config(home, lambda config: config["parameters"].update({NAME: entry}))
    with pytest.raises(CiuicError, match=NAME):
        load(home)


def test_config_of_another_model(home: Path, load: Callable[..., Any]) -> None:
    change_config(home, lambda config: config["parameters"][LINEAR].update(shape=[96, 144]))
    with pytest.raises(CiuicError, match=LINEAR):
        load(home)


def test_config_names_what_the_model_lacks(home: Path, load: Callable[..., Any]) -> None:
    change_config(home, lambda c: c["parameters"].update({"model.nothing.weight": c["parameters"][LINEAR]}))
    with pytest.raises(CiuicError, match=r"model\.nothing\.weight.*config\.json belongs to another model"):
        load(home)


def test_config_without_parameters(home: Path, load: Callable[..., Any]) -> None:
    change_config(home, lambda config: config.pop("parameters"))
    with pytest.raises(CiuicError, match="no compressed parameters"):
        load(home)


def test_config_with_an_unknown_key(home: Path, load: Callable[..., Any]) -> None:
    change_config(home, lambda config: config.update(rotation=True))
    with pytest.raises(CiuicError, match="rotation"):
        load(home)


def test_a_truncated_shard(home: Path, load: Callable[..., Any]) -> None:
    shard = min(home.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CiuicError, match=rf"{shard.name} is truncated"):
        load(home)
