"""Compressing a checkpoint into another one on disk, parameter by parameter (docs/adr/015).

``from_pretrained`` itself reads and converts, twice: the first time without weights, which tells what every file of
the result will hold, and the second time into those files. What was written is recorded, so that a run that was
stopped goes on where it was.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ciuic_hf.checkpoint import check_files, checkpoint_files, read_config
from ciuic_hf.errors import CiuicError
from ciuic_hf.hf import saving
from ciuic_hf.hf.config import CiuicConfig
from ciuic_hf.hf.destination import Destination, loading_to
from ciuic_hf.hf.merge import merge_for_ciuic
from ciuic_hf.hf.offline_destinations import Rehearsal, Streaming
from ciuic_hf.hf.origin import Origin, copy_companions, find_origin
from ciuic_hf.hf.recording import Recording, record_save
from ciuic_hf.hf.reporting import quietly
from ciuic_hf.hf.unfinished import Unfinished, describe_work, unfinished_path
from ciuic_hf.hf.writers import refusal
from ciuic_hf.memory import PeakMemory
from ciuic_hf.modules.packed import TAGS
from ciuic_hf.report import Report, Rounded
from ciuic_hf.shards import ShardFiles

__all__ = ["Progress", "compress_checkpoint", "unfinished_path"]

DEFAULT_SHARD_SIZE = "50GB"  # that of save_pretrained
_SHARD_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*[KMGT]B", re.IGNORECASE)


@dataclass(frozen=True)
class Progress:
    """How far a compression is.

    Attributes:
        files: of the result that hold weights.
        nbytes, written: bytes of all tensors of the result, and those that are written.
        resumed: of ``written``, bytes that an earlier run wrote.
    """

    files: int
    nbytes: int
    written: int = 0
    resumed: int = 0


def compress_checkpoint(
    source: str | Path,
    destination: str | Path,
    config: CiuicConfig,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    restart: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Report:
    """Compress a checkpoint of any size, holding one piece of one weight in memory.

    The result is what ``AutoModelForCausalLM.from_pretrained(source, quantization_config=config)`` and
    ``save_pretrained(destination, max_shard_size=...)`` would write, byte for byte, and the tokenizer's files. It
    appears under its name when it is whole; until then it is in ``<destination>.ciuic-unfinished`` beside it, where
    the same call goes on after a crash or an interrupt.

    Args:
        source: directory of a bf16, fp16, fp32 or FP8 checkpoint in safetensors, or its name on the hub.
        destination: a directory that does not exist or is empty.
        restart: throw unfinished work away.

    Raises:
        CiuicError: for a source that is incomplete or compressed already, a destination in use, a disk that is too
            small, or unfinished work of other settings or another source.
    """
    started, target = time.perf_counter(), Path(destination).resolve()
    _check_shard_size(max_shard_size)
    origin = find_origin(source)
    _check_source(origin)
    _check_target(target, origin)
    saving.install()
    with PeakMemory() as peak, quietly():
        rehearsal = Rehearsal()
        model = _load(origin, config, rehearsal)
        plan = describe_work(origin, config, max_shard_size, rehearsal.codec_ids)
        with Unfinished(target, restart) as work:
            if work.is_begun:
                work.check_same(plan)
            recording = _prepare(model, origin, work, max_shard_size)
            files = ShardFiles(work.model, recording.headers, recording.slots)
            _begin_or_resume(work, plan, files)
            rounded = _stream(origin, config, work, files, recording, rehearsal, on_progress)
            if describe_work(origin, config, max_shard_size, rehearsal.codec_ids) != plan:
                raise CiuicError(f"Files of {origin.directory} changed while they were read; begin anew.")
            work.publish()
    report: Report = model.ciuic_report
    report.source, report.rounded = origin.name, rounded
    report.did, report.seconds = "Compressed", time.perf_counter() - started
    report.peak_nbytes, report.peak_of = peak.nbytes, peak.kind
    return report


def _check_shard_size(size: int | str) -> None:
    """Raise CiuicError for a size that transformers does not read."""
    if isinstance(size, str):
        match = _SHARD_SIZE.fullmatch(size)
        valid = match is not None and float(match[1]) > 0
    else:
        valid = size > 0
    if not valid:
        raise CiuicError(
            f"max_shard_size must be a size such as 50GB (KB, MB, GB, TB) or bytes, got {size!r}."
        )


def _check_source(origin: Origin) -> None:
    """Raise CiuicError for a checkpoint that is incomplete or compressed already."""
    quantized = read_config(origin.directory).get("quantization_config")
    if quantized is not None and merge_for_ciuic(quantized, CiuicConfig()) is None:
        raise CiuicError(f"{origin.name} is compressed by Ciuic already; give the original model.")
    check_files(checkpoint_files(origin.directory))


def _check_target(target: Path, origin: Origin) -> None:
    """Raise CiuicError for a destination that cannot be made."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise CiuicError(f"{target} exists already; delete it or choose another destination.")
    if target.is_relative_to(origin.directory):
        raise CiuicError(f"{target} is inside the source {origin.directory}; choose another destination.")


def _load(origin: Origin, config: CiuicConfig, destination: Destination) -> Any:
    """Let transformers load to a destination."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with loading_to(destination):
            return AutoModelForCausalLM.from_pretrained(origin.directory, quantization_config=config)
    except ValueError as error:
        other = refusal(origin.name, AutoConfig.from_pretrained(origin.directory))
        if other is not None:
            raise other from error
        raise


def _prepare(model: Any, origin: Origin, work: Unfinished, max_shard_size: int | str) -> Recording:
    """Write everything but the weights, and learn where each of those belongs."""
    model.config.name_or_path = origin.name
    work.model.mkdir(exist_ok=True)
    saving.write_card(model, work.model, work.target.name)
    recording = record_save(model, work.model, max_shard_size)
    absent = sorted(name for name in recording.real_names if not name.endswith(TAGS))
    if absent:
        raise CiuicError(f"{absent[0]} is missing from the files of {origin.name}; download them again.")
    copy_companions(origin.directory, work.model)
    return recording


def _begin_or_resume(work: Unfinished, plan: dict[str, Any], files: ShardFiles) -> None:
    """Make the files, or check those of an earlier run."""
    if work.is_begun:
        files.check()
    missing = sum(slot.nbytes for name, slot in files.slots.items() if name not in work.journal.done)
    saving.check_space(missing + saving.MARGIN_NBYTES, work.target)
    if not work.is_begun:
        files.create()
        work.journal.begin(plan)


def _stream(
    origin: Origin,
    config: CiuicConfig,
    work: Unfinished,
    files: ShardFiles,
    recording: Recording,
    rehearsal: Rehearsal,
    on_progress: Callable[[Progress], None],
) -> Rounded | None:
    """Load again, this time into the files. Returns what was rounded by a calibration in this run."""
    total = sum(slot.nbytes for slot in files.slots.values())
    resumed = written = sum(files.slots[name].nbytes for name in work.journal.done)

    def advanced(nbytes: int) -> None:
        nonlocal written
        written += nbytes
        on_progress(Progress(len(files.headers), total, written, resumed))

    advanced(0)
    streaming = Streaming(files, work.journal, recording.stored_names, rehearsal.duplicates, advanced)
    try:
        loaded = _load(origin, config, streaming)
    finally:
        streaming.sync()  # an interrupt too keeps what is finished
        files.close()
    left = files.slots.keys() - work.journal.done
    assert not left, f"never written: {sorted(left)[:3]}"
    rounded: Rounded | None = loaded.ciuic_report.rounded
    return rounded
