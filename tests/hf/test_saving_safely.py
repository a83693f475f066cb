"""Saving over a checkpoint: either the new one is whole or the old one is untouched, and nothing is left behind."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import modeling_utils

from ciuic_hf import CiuicError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def home(tmp_path: Path, saved: Callable[[str], Path]) -> Path:
    """A directory that holds one compressed checkpoint, ``model``, with a tokenizer file beside the weights."""
    shutil.copytree(saved("v3_bf16"), tmp_path / "home" / "model")
    (tmp_path / "home" / "model" / "tokenizer.json").write_text("{}")
    return tmp_path / "home"


def crash_after(monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    """Let saving fail once this many shards are written."""
    save, written = modeling_utils.safe_save_file, []

    def failing(*args: Any, **kwargs: Any) -> None:
        if len(written) == shards:
            raise OSError("power cut")
        written.append(args)
        save(*args, **kwargs)

    monkeypatch.setattr(modeling_utils, "safe_save_file", failing)


@pytest.mark.parametrize("shards", [0, 1, 3])
def test_a_crash_leaves_the_previous_checkpoint(
    shards: int,
    home: Path,
    checkpoint: Callable[[str], Path],
    load: Callable[..., Any],
    snapshot: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = snapshot(home)
    model = load(checkpoint("v3_bf16"), 6)
    crash_after(monkeypatch, shards)
    with pytest.raises(OSError, match="power cut"):
        model.save_pretrained(home / "model", max_shard_size="60KB")
    assert snapshot(home) == before
    assert [entry.name for entry in home.iterdir()] == ["model"]


def test_a_crash_of_a_first_save_leaves_nothing(
    tmp_path: Path,
    checkpoint: Callable[[str], Path],
    load: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load(checkpoint("v3_bf16"), 6)
    crash_after(monkeypatch, 1)
    with pytest.raises(OSError, match="power cut"):
        model.save_pretrained(tmp_path / "new", max_shard_size="60KB")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stopped", [OSError("disk gone"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_stopping_between_the_two_renames_leaves_the_previous_checkpoint(
    stopped: BaseException,
    home: Path,
    checkpoint: Callable[[str], Path],
    load: Callable[..., Any],
    snapshot: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, rename = snapshot(home), Path.rename
    model = load(checkpoint("v3_bf16"), 6)

    def stopping(self: Path, target: Path) -> Path:
        if ".saving-" in self.name:
            raise stopped
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopping)
    with pytest.raises(type(stopped)):
        model.save_pretrained(home / "model")
    assert snapshot(home) == before
    assert [entry.name for entry in home.iterdir()] == ["model"]


def test_a_readme_of_the_users_own_stays(
    tmp_path: Path, saved: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    model, readme = load(saved("v3_bf16")), tmp_path / "model" / "README.md"
    model.save_pretrained(tmp_path / "model")
    assert "import ciuic_hf" in readme.read_text()
    model.save_pretrained(tmp_path / "model")  # a card of ours is written anew
    assert "import ciuic_hf" in readme.read_text()
    readme.write_text("mine")
    model.save_pretrained(tmp_path / "model")
    assert readme.read_text() == "mine"


def test_saving_over_the_files_the_model_is_mapped_from(
    home: Path, load: Callable[..., Any], ids: torch.Tensor, snapshot: Callable[[Path], dict[str, bytes]]
) -> None:
    model = load(home / "model")
    before, logits = snapshot(home), model(ids).logits
    model.save_pretrained(home / "model", max_shard_size="100KB")
    assert torch.equal(model(ids).logits, logits)
    assert torch.equal(load(home / "model")(ids).logits, logits)
    assert snapshot(home).keys() == before.keys()
    assert {k: v for k, v in snapshot(home).items() if k.endswith("safetensors")} == {
        k: v for k, v in before.items() if k.endswith("safetensors")
    }


def test_weights_of_the_previous_checkpoint_go_and_other_files_stay(
    home: Path, checkpoint: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    (home / "model" / "assets").mkdir()
    (home / "model" / "assets" / "logo.txt").write_text("logo")
    old = {file.name for file in (home / "model").glob("model-*.safetensors")}
    assert len(old) > 1
    load(checkpoint("v3_bf16"), 4).save_pretrained(home / "model")
    names = {file.name for file in (home / "model").iterdir()}
    assert "model.safetensors" in names and not names & old
    assert "model.safetensors.index.json" not in names
    assert {"tokenizer.json", "assets", "config.json", "README.md"} <= names
    assert (home / "model" / "assets" / "logo.txt").read_text() == "logo"


def test_no_space_is_said_before_anything_is_written(
    home: Path,
    checkpoint: Callable[[str], Path],
    load: Callable[..., Any],
    snapshot: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, before = load(checkpoint("v3_bf16"), 4), snapshot(home)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 30, 1 << 30, 1000))
    for target in (home / "model", home / "deep" / "below"):
        with pytest.raises(CiuicError, match=r"needs .* free; nothing was written\. Free some space"):
            model.save_pretrained(target)
    assert snapshot(home) == before and [entry.name for entry in home.iterdir()] == ["model"]


def test_a_new_directory_gets_ordinary_permissions(
    tmp_path: Path, checkpoint: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    (tmp_path / "plain").mkdir()
    load(checkpoint("v3_bf16"), 4).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_saving_through_a_link_keeps_the_link(
    home: Path, load: Callable[..., Any], saved: Callable[[str], Path]
) -> None:
    (home / "link").symlink_to(home / "model", target_is_directory=True)
    load(saved("v3_bf16")).save_pretrained(home / "link")
    assert (home / "link").is_symlink()
    assert (home / "model" / "model.safetensors").is_file()
