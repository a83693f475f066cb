"""Saving compressed models: beside the old checkpoint first, then in its place, so that a crash loses nothing.

``PreTrainedModel.save_pretrained`` writes into the directory it is given, file by file. For a compressed model it
is pointed at a new directory, which takes the place of the old one by renaming when everything is on disk
(docs/adr/005). Files in the old directory that are not weights, such as a tokenizer, are carried over.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from ciuic_hf.errors import CiuicError
from ciuic_hf.hf.card import model_card
from ciuic_hf.hf.config import CiuicConfig
from ciuic_hf.hf.reporting import build_report
from ciuic_hf.modules.swap import compressed_modules
from ciuic_hf.report import human_bytes

_WEIGHTS = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|model.*\.index\.json"
)
MARGIN_NBYTES = 16 << 20  # config, index, card


def is_compressed(model: Any) -> bool:
    """Whether a model was loaded by Ciuic and still holds compressed weights."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return isinstance(config, CiuicConfig) and next(compressed_modules(model), None) is not None


def check_space(nbytes: int, directory: Path) -> None:
    """Raise CiuicError when ``nbytes`` do not fit on the disk of ``directory``."""
    existing = next(parent for parent in (directory, *directory.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if nbytes > free:
        raise CiuicError(
            f"Saving to {directory} needs {human_bytes(nbytes)} but the disk has {human_bytes(free)} free; "
            "nothing was written. Free some space or save somewhere else."
        )


def replace_directory(staged: Path, target: Path) -> None:
    """Put ``staged`` in the place of ``target``, keeping the files of ``target`` that are not weights."""
    umask = os.umask(0)
    os.umask(umask)
    staged.chmod(0o777 & ~umask)
    if not target.exists():
        staged.rename(target)
        return
    for entry in target.iterdir():
        if not _WEIGHTS.fullmatch(entry.name) and not (staged / entry.name).exists():
            _carry(entry, staged / entry.name)
    if Path.cwd().is_relative_to(target):
        _move_files(staged, target)  # a directory that somebody stands in cannot be swapped under them
        return
    previous = Path(tempfile.mkdtemp(prefix=f".{target.name}.previous-", dir=target.parent)) / target.name
    target.rename(previous)
    try:
        staged.rename(target)
    except BaseException:  # an interrupt too: whatever happens, one whole checkpoint stays under its name
        if not target.exists():
            previous.rename(target)
            previous.parent.rmdir()
        raise
    shutil.rmtree(previous.parent)


def _carry(source: Path, destination: Path) -> None:
    """Link a file or folder into the new directory; copy where the disk cannot link."""
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, destination, symlinks=True, copy_function=_link)
    else:
        _link(source, destination)


def _link(source: str | Path, destination: str | Path) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, destination, follow_symlinks=False)


def _move_files(staged: Path, target: Path) -> None:
    """Replace file by file, the index and config.json last, then remove weights of the old checkpoint."""
    new = sorted(
        staged.iterdir(), key=lambda entry: (entry.name.endswith(".json"), entry.name == "config.json")
    )
    for entry in new:
        if not (target / entry.name).is_dir():
            entry.replace(target / entry.name)
    for entry in target.iterdir():
        if _WEIGHTS.fullmatch(entry.name) and entry.name not in {moved.name for moved in new}:
            entry.unlink()


def _save(
    original: Callable[..., Any], model: Any, save_directory: str | os.PathLike[str], **kwargs: Any
) -> Any:
    target = Path(save_directory).resolve()
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    check_space(nbytes + MARGIN_NBYTES, target)
    if kwargs.get("push_to_hub"):
        kwargs.setdefault("repo_id", target.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.saving-", dir=target.parent))
    try:
        if _card_is_ours(target):
            write_card(model, staged, kwargs.get("repo_id") or target.name)
        result = original(model, staged, **kwargs)
        replace_directory(staged, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return result


def _card_is_ours(directory: Path) -> bool:
    """Whether README.md may be written: there is none, or it is a card of an earlier save."""
    card = directory / "README.md"
    return not card.exists() or "\n- ciuic\n" in card.read_text(encoding="utf-8", errors="replace")


def write_card(model: Any, directory: Path, repository: str) -> None:
    """Write README.md, the model card."""
    report = build_report(model, model.hf_quantizer.quantization_config)
    (directory / "README.md").write_text(model_card(model, report, repository), encoding="utf-8")


def install() -> None:
    """Wrap saving and uploading of ``PreTrainedModel`` once; models that are not Ciuic's take the original path.

    Called when the first quantizer is made: importing ``PreTrainedModel`` earlier would make ``import ciuic_hf`` slow.
    """
    from transformers import PreTrainedModel

    original_save = PreTrainedModel.save_pretrained
    original_upload = PreTrainedModel._upload_modified_files
    if getattr(original_save, "wrapped_by_ciuic", False):
        return

    @wraps(original_save)
    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original_save).bind_partial(self, save_directory, *args, **kwargs).arguments
        writes = given.get("is_main_process", True) and not Path(save_directory).is_file()
        if not is_compressed(self) or not writes or getattr(self, "_hf_peft_config_loaded", False):
            return original_save(self, save_directory, *args, **kwargs)
        options = {
            name: value for name, value in given.items() if name not in ("self", "save_directory", "kwargs")
        }
        return _save(original_save, self, save_directory, **options, **given.get("kwargs", {}))

    @wraps(original_upload)
    def _upload_modified_files(
        self: Any, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any
    ) -> Any:
        if is_compressed(self):
            write_card(self, Path(working_dir), repo_id)  # push_to_hub wrote a card of its own over ours
        return original_upload(self, working_dir, repo_id, *args, **kwargs)

    save_pretrained.wrapped_by_ciuic = True  # type: ignore[attr-defined]
    PreTrainedModel.save_pretrained = save_pretrained
    PreTrainedModel._upload_modified_files = _upload_modified_files
