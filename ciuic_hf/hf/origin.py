"""The checkpoint that is compressed offline: a directory, or a model of the hub that is downloaded to the cache."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from ciuic_hf.errors import CiuicError

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_COMPANIONS = (  # what a tokenizer or processor consists of, and the terms of the model
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "additional_chat_templates/*", "*processor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
_DOWNLOADED = (*_COMPANIONS, "*.safetensors", "*.json")
_NOT_DOWNLOADED = ("original/*", "consolidated*")


@dataclass(frozen=True)
class Origin:
    """A checkpoint.

    Attributes:
        name: as the user and the model card call it.
    """

    directory: Path
    name: str


def find_origin(source: str | Path) -> Origin:
    """The directory of a checkpoint, downloaded if it is none. Raises CiuicError."""
    path = Path(source)
    if path.is_dir():
        return Origin(path.resolve(), str(source))
    if isinstance(source, Path) or not _HUB_NAME.fullmatch(source) or source.startswith("."):
        raise CiuicError(f"{source} is not there; give the directory of a model or its name on the hub.")
    return Origin(_download(source), source)


def _download(name: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(
            snapshot_download(name, allow_patterns=list(_DOWNLOADED), ignore_patterns=list(_NOT_DOWNLOADED))
        )
    except errors.RepositoryNotFoundError:
        raise CiuicError(
            f"{name} is neither a directory here nor a model on the hub that you can read; if it is private or gated, "
            "run `hf auth login`."
        ) from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CiuicError(f"{name} is not a directory here and cannot be downloaded: {reason}") from error


def copy_companions(directory: Path, target: Path) -> None:
    """Copy the files of tokenizer and processor and the licence, except those that are there already."""
    for pattern in _COMPANIONS:
        for file in sorted(directory.glob(pattern)):
            copy = target / file.relative_to(directory)
            if file.is_file() and not copy.exists():
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
