"""A compression that is stopped anywhere goes on there, and what cannot work is refused before it begins."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ciuic_hf import CiuicConfig, CiuicError
from ciuic_hf.demo.config import BENCHMARK_CONFIG
from ciuic_hf.demo.synthetic import random_deepseek_v3
from ciuic_hf.hf import offline_destinations
from ciuic_hf.hf.offline import Progress, compress_checkpoint, unfinished_path
from ciuic_hf.journal import Journal
from ciuic_hf.memory import anonymous_nbytes
from ciuic_hf.shards import ShardFiles

Usage = namedtuple("Usage", "total used free")
Snapshot = Callable[[Path], dict[str, bytes]]
CONFIG = CiuicConfig(bits=4.25)
OPTIONS: dict[str, Any] = {"max_shard_size": "60KB"}


@pytest.fixture(scope="module")
def whole(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "model"
    compress_checkpoint(checkpoint("v3_fp8"), out, CONFIG, **OPTIONS)
    return out


def stop_at(monkeypatch: pytest.MonkeyPatch, write: int, error: BaseException) -> None:
    """Let the given write fail."""
    original, writes = ShardFiles.write, []

    def failing(self: ShardFiles, *args: Any) -> None:
        writes.append(args)
        if len(writes) == write:
            raise error
        original(self, *args)

    monkeypatch.setattr(ShardFiles, "write", failing)


@pytest.fixture
def stopped(checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The destination of a run that was interrupted in the middle."""
    with monkeypatch.context() as patched:
        stop_at(patched, 40, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            compress_checkpoint(checkpoint("v3_fp8"), tmp_path / "model", CONFIG, **OPTIONS)
    return tmp_path / "model"


@pytest.mark.parametrize("write", [1, 2, 30, 77])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("gone")], ids=["interrupt", "error"])
def test_going_on_gives_the_same_bytes(
    write: int,
    error: BaseException,
    whole: Path,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "model"
    with monkeypatch.context() as patched:
        stop_at(patched, write, error)
        with pytest.raises(type(error)):
            compress_checkpoint(checkpoint("v3_fp8"), out, CONFIG, **OPTIONS)
    assert not out.exists() and unfinished_path(out).name == "model.ciuic-unfinished"
    seen: list[Progress] = []
    compress_checkpoint(checkpoint("v3_fp8"), out, CONFIG, on_progress=seen.append, **OPTIONS)
    assert (seen[0].resumed > 0) == (write > 2)
    assert snapshot(out) == snapshot(whole)
    assert list(tmp_path.iterdir()) == [out]


def test_what_is_finished_is_not_done_again(
    stopped: Path, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal(unfinished_path(stopped) / "journal.jsonl") as journal:
        done = journal.done
    written: set[str] = set()
    original = ShardFiles.write

    def watched(self: ShardFiles, name: str, *args: Any) -> None:
        written.add(name)
        original(self, name, *args)

    monkeypatch.setattr(ShardFiles, "write", watched)
    compress_checkpoint(checkpoint("v3_fp8"), stopped, CONFIG, **OPTIONS)
    assert done and not done & written


KILLED = """
import os, signal, sys
from ciuic_hf import CiuicConfig
from ciuic_hf.hf import offline_destinations
from ciuic_hf.hf.offline import compress_checkpoint
from ciuic_hf.shards import ShardFiles

offline_destinations.SYNC_NBYTES = 0
write, writes = ShardFiles.write, []
def killing(self, name, offset, part):
    writes.append(name)
    if len(writes) == 50:
        write(self, name, offset, part[: len(part) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, name, offset, part)
ShardFiles.write = killing
compress_checkpoint(sys.argv[1], sys.argv[2], CiuicConfig(bits=4.25), max_shard_size="60KB")
"""


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.slow
def test_a_killed_process(
    whole: Path, checkpoint: Callable[[str], Path], tmp_path: Path, snapshot: Snapshot
) -> None:
    out = tmp_path / "model"
    assert run_python(KILLED, checkpoint("v3_fp8"), out).returncode == -signal.SIGKILL
    journal = unfinished_path(out) / "journal.jsonl"
    with journal.open("ab") as file:
        file.write(b'{"done": ["model.norm.weig')  # a line that a crash cut off
    seen: list[Progress] = []
    compress_checkpoint(checkpoint("v3_fp8"), out, CONFIG, on_progress=seen.append, **OPTIONS)
    assert seen[0].resumed > 0
    assert snapshot(out) == snapshot(whole)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (CiuicConfig(bits=3), OPTIONS, r"another setting bits \(4.25, now 3.0\); repeat the command"),
        (CiuicConfig(bits=4.25, modules={"lm_head": "raw"}), OPTIONS, "another setting modules"),
        (CONFIG, {"max_shard_size": "1MB"}, r"another setting max_shard_size \(60KB, now 1MB\)"),
    ],
)
def test_other_settings_are_refused(
    config: CiuicConfig,
    options: dict[str, Any],
    message: str,
    stopped: Path,
    whole: Path,
    checkpoint: Callable[[str], Path],
    snapshot: Snapshot,
) -> None:
    with pytest.raises(CiuicError, match=message):
        compress_checkpoint(checkpoint("v3_fp8"), stopped, config, **options)
    compress_checkpoint(checkpoint("v3_fp8"), stopped, CONFIG, **OPTIONS)
    assert snapshot(stopped) == snapshot(whole)


def test_restart_throws_unfinished_work_away(stopped: Path, checkpoint: Callable[[str], Path]) -> None:
    seen: list[Progress] = []
    compress_checkpoint(
        checkpoint("v3_fp8"), stopped, CiuicConfig(bits=3), restart=True, on_progress=seen.append
    )
    assert seen[0].resumed == 0 and (stopped / "model.safetensors").is_file()


def test_a_changed_source_is_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("v3_fp8"), source)
    with monkeypatch.context() as patched:
        stop_at(patched, 40, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            compress_checkpoint(source, tmp_path / "model", CONFIG)
    (file, *_) = sorted(source.glob("*.safetensors"))
    os.utime(file, (1, 1))
    with pytest.raises(CiuicError, match=f"another file {file.name}; repeat .* --restart"):
        compress_checkpoint(source, tmp_path / "model", CONFIG)


def test_a_source_that_changes_meanwhile(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("v3_fp8"), source)
    with pytest.raises(CiuicError, match="changed while they were read"):
        compress_checkpoint(
            source, tmp_path / "model", CONFIG, on_progress=lambda _: os.utime(source / "config.json", (1, 1))
        )
    assert not (tmp_path / "model").exists()


def test_two_at_once(stopped: Path, checkpoint: Callable[[str], Path]) -> None:
    with (
        Journal(unfinished_path(stopped) / "journal.jsonl"),
        pytest.raises(CiuicError, match="Another process is at work"),
    ):
        compress_checkpoint(checkpoint("v3_fp8"), stopped, CONFIG, **OPTIONS)


def test_unfinished_files_that_were_damaged(stopped: Path, checkpoint: Callable[[str], Path]) -> None:
    (file, *_) = sorted((unfinished_path(stopped) / "model").glob("*.safetensors"))
    os.truncate(file, 100)
    with pytest.raises(CiuicError, match=f"{file.name} .*is missing or damaged; begin anew"):
        compress_checkpoint(checkpoint("v3_fp8"), stopped, CONFIG, **OPTIONS)


def _remove_shard(source: Path) -> None:
    sorted(source.glob("*.safetensors"))[1].unlink()


def _cut_shard(source: Path) -> None:
    file = sorted(source.glob("*.safetensors"))[1]
    os.truncate(file, file.stat().st_size - 10)


def _forget_norm(source: Path) -> None:
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = content["weight_map"].pop("model.norm.weight")
    content["weight_map"] = {n: f for n, f in content["weight_map"].items() if f != file}
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove_shard, "is missing: a shard that the index names is not there"),
        (_cut_shard, "is truncated"),
        (_forget_norm, "missing"),
        (lambda source: (source / "config.json").unlink(), "it has no config.json"),
    ],
    ids=["no shard", "cut off", "no weight", "no config"],
)
def test_an_incomplete_source_leaves_nothing(
    damage: Callable[[Path], None], message: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("v3_fp8"), source)
    damage(source)
    with pytest.raises(CiuicError, match=message):
        compress_checkpoint(source, tmp_path / "model", CONFIG)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("what", ["full", "file", "inside", "compressed", "nothing", "plan"])
def test_refused(
    what: str, saved: Callable[[str], Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out, config = checkpoint("v3_fp8"), tmp_path / "model", CONFIG
    if what == "full":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    elif what == "file":
        out.write_text("mine")
    elif what == "inside":
        out = source / "model"
    elif what == "compressed":
        source = saved("v3_fp8")
    elif what == "nothing":
        source = tmp_path / "nothing"
    else:
        config = CiuicConfig(plan=tmp_path / "no-plan.json")
    before = sorted(tmp_path.rglob("*"))
    messages = {"inside": "is inside the source", "compressed": "is compressed by Ciuic already"}
    messages |= {"nothing": "is not there", "plan": "There is no plan"}
    with pytest.raises(CiuicError, match=messages.get(what, "exists already; delete it")):
        compress_checkpoint(source, out, config)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_directory_may_be_there(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    compress_checkpoint(checkpoint("v3_fp8"), tmp_path / "model", CONFIG)
    assert (tmp_path / "model" / "config.json").is_file()


def test_a_disk_that_is_too_small(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 10**6))
    with pytest.raises(CiuicError, match="free; nothing was written"):
        compress_checkpoint(checkpoint("v3_fp8"), tmp_path / "model", CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up(
    whole: Path,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = ShardFiles._opened

    class Full:
        def __init__(self, file: Any) -> None:
            self.seek = file.seek

        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def full_at_the_end(self: ShardFiles, file: str) -> Any:
        real = opened(self, file)
        return Full(real) if file > "model-00004" else real

    with monkeypatch.context() as patched:
        patched.setattr(ShardFiles, "_opened", full_at_the_end)
        with pytest.raises(CiuicError, match="is full; free some space and repeat"):
            compress_checkpoint(checkpoint("v3_fp8"), tmp_path / "model", CONFIG, **OPTIONS)
    compress_checkpoint(checkpoint("v3_fp8"), tmp_path / "model", CONFIG, **OPTIONS)
    assert snapshot(tmp_path / "model") == snapshot(whole)


MEASURED = """
import sys
import torch
torch.set_num_threads(1)
from ciuic_hf import CiuicConfig
from ciuic_hf.hf.offline import compress_checkpoint
print(compress_checkpoint(sys.argv[1], sys.argv[2], CiuicConfig(bits=4.25)).peak_nbytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(anonymous_nbytes() is None, reason="this system does not tell anonymous memory")
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_memory_is_that_of_a_piece(fp8: bool, tmp_path: Path) -> None:
    """640 million weights: 1.2 GB in bf16, 352 MB compressed; the peak holds imports and kernels too."""
    random_deepseek_v3(tmp_path / "source", fp8=fp8, **BENCHMARK_CONFIG)
    done = run_python(MEASURED, tmp_path / "source", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert size > 330 << 20
    assert int(done.stdout.split()[-1]) < 200 << 20


def test_pieces_do_not_change_a_byte(
    whole: Path,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offline_destinations, "PIECE_WEIGHTS", 1)  # a strip at a time
    monkeypatch.setattr(offline_destinations, "SYNC_NBYTES", 0)
    compress_checkpoint(checkpoint("v3_fp8"), tmp_path / "model", CONFIG, **OPTIONS)
    assert snapshot(tmp_path / "model") == snapshot(whole)
