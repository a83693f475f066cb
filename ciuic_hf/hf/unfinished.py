"""The directory in which a compressed checkpoint grows, and what makes two runs the same work."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import safetensors
import transformers
from torch import Tensor

from ciuic_hf.checkpoint import checkpoint_files
from ciuic_hf.errors import CiuicError
from ciuic_hf.hf.config import CiuicConfig
from ciuic_hf.hf.origin import Origin
from ciuic_hf.hf.saving import replace_directory
from ciuic_hf.journal import Journal
from ciuic_kernels import FORMAT_VERSION

SUFFIX = ".ciuic-unfinished"
_NO_SETTINGS = (
    "quant_method",
    "format_version",
    "parameters",
    "kept",
    "source_quantization",
)  # of a CiuicConfig
_FILES = ("plan", "sensitivity", "calibration")


def unfinished_path(destination: str | Path) -> Path:
    """Where the work for a destination is until it is finished."""
    target = Path(destination).resolve()
    return target.with_name(target.name + SUFFIX)


def describe_work(
    origin: Origin, config: CiuicConfig, max_shard_size: int | str, codec_ids: Mapping[str, Tensor]
) -> dict[str, Any]:
    """All that the bytes of the result depend on, as JSON."""
    read = [origin.directory / "config.json", *checkpoint_files(origin.directory)]
    settings = {name: value for name, value in vars(config).items() if name not in _NO_SETTINGS}
    for name in _FILES:
        if settings[name] is not None:  # what counts is what it says
            settings[name] = hashlib.sha256(Path(settings[name]).read_bytes()).hexdigest()[:16]
    chosen = hashlib.sha256()
    for name in sorted(codec_ids):
        chosen.update(f"{name} {list(codec_ids[name].shape)}".encode())
        chosen.update(codec_ids[name].contiguous().numpy().tobytes())
    work = {
        "source": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in read},
        "settings": settings | {"max_shard_size": max_shard_size},
        "versions": {
            "format": FORMAT_VERSION,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
        "codecs": chosen.hexdigest(),
    }
    return dict(json.loads(json.dumps(work, default=str)))


class Unfinished:
    """``<target>.ciuic-unfinished``: the growing checkpoint in ``model`` and the record of what is finished.

    Attributes:
        target: where the checkpoint appears when it is whole.
        model: where it is until then.
    """

    def __init__(self, target: Path, restart: bool) -> None:
        self.target = target
        self.directory = unfinished_path(target)
        self.model = self.directory / "model"
        self.directory.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(self.directory / "journal.jsonl")
        if restart or not self.is_begun:
            shutil.rmtree(self.model, ignore_errors=True)
            self.journal.forget()

    @property
    def is_begun(self) -> bool:
        """Whether an earlier run, or this one, has made the files."""
        return self.journal.identity is not None

    def check_same(self, plan: dict[str, Any]) -> None:
        """Raise CiuicError unless the work that was begun here is this one."""
        begun = self.journal.identity
        assert begun is not None
        way_out = "repeat the command that began it, or begin anew with --restart (restart=True)."
        for part, what in (("source", "file"), ("settings", "setting"), ("versions", "version of")):
            then, now = begun.get(part, {}), plan[part]
            differing = sorted(key for key in {*then, *now} if then.get(key) != now.get(key))
            if differing:
                was = _change(part, then.get(differing[0]), now.get(differing[0]))
                raise CiuicError(
                    f"{self.directory} was begun with another {what} {differing[0]}{was}; {way_out}"
                )
        if begun.get("codecs") != plan["codecs"]:
            raise CiuicError(f"{self.directory} was begun with other codecs; {way_out}")

    def publish(self) -> None:
        """Put the checkpoint under its name; nothing else is left."""
        replace_directory(self.model, self.target)
        self.journal.close()
        shutil.rmtree(self.directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the record; a directory in which nothing was begun goes."""
        self.journal.close()
        if not self.is_begun:
            shutil.rmtree(self.directory, ignore_errors=True)


def _change(part: str, then: object, now: object) -> str:
    return "" if part == "source" else f" ({then}, now {now})"
