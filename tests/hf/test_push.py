"""``push_to_hub``: one commit, and its model card says how to use the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, bytes]]:
    """What would have been uploaded: file name -> content, for each commit."""
    uploaded: list[dict[str, bytes]] = []

    def create_repo(self: HfApi, repo_id: str, **_: Any) -> SimpleNamespace:
        full = repo_id if "/" in repo_id else f"someone/{repo_id}"
        return SimpleNamespace(repo_id=full, repo_type="model")

    def create_commit(self: HfApi, *_: Any, operations: Any, **__: Any) -> SimpleNamespace:
        uploaded.append({o.path_in_repo: _content(o.path_or_fileobj) for o in operations})
        return SimpleNamespace(commit_url="", oid="0", pr_url=None)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "whoami", lambda *_, **__: {"name": "someone"})
    return uploaded


def _content(source: Any) -> bytes:
    if isinstance(source, bytes):
        return source
    return Path(source).read_bytes() if isinstance(source, str | Path) else source.read()


def test_push_to_hub(
    commits: list[dict[str, bytes]], saved: Callable[[str], Path], load: Callable[..., Any], tmp_path: Path
) -> None:
    load(saved("v3_fp8")).push_to_hub("someone/small-model")
    (files,) = commits
    assert {"config.json", "model.safetensors", "README.md"} <= files.keys()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(files[name])
    assert load(tmp_path).ciuic_report.nbytes == load(saved("v3_fp8")).ciuic_report.nbytes
    card = files["README.md"].decode()
    assert "import ciuic_hf" in card and 'from_pretrained("someone/small-model")' in card
    assert "pip install ciuic-hf" in card and "- ciuic" in card and "4.2" in card
    assert card.startswith("---\n")


def test_save_pretrained_with_push(
    commits: list[dict[str, bytes]], saved: Callable[[str], Path], load: Callable[..., Any], tmp_path: Path
) -> None:
    load(saved("v3_fp8")).save_pretrained(tmp_path / "small-model", push_to_hub=True)
    (files,) = commits
    assert "model.safetensors" in files
    assert "small-model" in files["README.md"].decode() and "import ciuic_hf" in files["README.md"].decode()
    assert {entry.name for entry in tmp_path.iterdir()} == {"small-model"}


def test_card_of_a_saved_model(
    saved: Callable[[str], Path], load: Callable[..., Any], tmp_path: Path
) -> None:
    load(saved("qwen2_tied")).save_pretrained(tmp_path / "tiny")
    card = (tmp_path / "tiny" / "README.md").read_text()
    assert "AutoModelForCausalLM" in card and "| embeddings | 1 |" in card and str(tmp_path) not in card
