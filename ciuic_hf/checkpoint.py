"""Checkpoint files read without building a model: completeness checks and parameter sizes from headers."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ciuic_hf.errors import CiuicError

MAX_HEADER_NBYTES = 100_000_000  # the safetensors limit
DTYPE_NBYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorHeader:
    """A tensor as a safetensors header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path


def is_shape(shape: object) -> bool:
    """Whether this, from a file, is the shape of a matrix or of fused experts."""
    return (
        isinstance(shape, list) and len(shape) in (2, 3) and all(isinstance(s, int) and s > 0 for s in shape)
    )


def read_header(path: Path) -> list[TensorHeader]:
    """All tensors of one safetensors file. Raises CiuicError when the file is missing, cut off or no safetensors."""
    if not path.is_file():
        raise CiuicError(
            f"{path} is missing: a shard that the index names is not there; download or copy it again."
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 < length <= min(MAX_HEADER_NBYTES, size - 8):
            raise CiuicError(f"{path} is truncated or not a safetensors file; download or copy it again.")
        try:
            header = dict(json.loads(file.read(length)))
        except (TypeError, ValueError):
            raise CiuicError(f"{path} has a damaged safetensors header; download or copy it again.") from None
    header.pop("__metadata__", None)
    tensors = [tensor_header(name, entry, path) for name, entry in header.items()]
    expected = 8 + length + data_nbytes(header, tensors, path)
    if size != expected:
        raise CiuicError(
            f"{path} is truncated: it has {size:,} bytes and its header describes {expected:,}; download it again."
        )
    return tensors


def data_nbytes(entries: Mapping[str, dict], tensors: list[TensorHeader], path: Path) -> int:
    """Bytes after the header. Raises CiuicError when the tensors leave holes in them or overlap."""
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if sum(tensor.nbytes for tensor in tensors) != end:
        raise CiuicError(f"{path}: the tensors of its header overlap or leave holes; download it again.")
    return end


def tensor_header(name: str, entry: dict, path: Path) -> TensorHeader:
    """One entry of a safetensors header. Raises CiuicError when it contradicts itself."""
    try:
        begin, end = entry["data_offsets"]
        nbytes, shape = end - begin, tuple(entry["shape"])
        element = DTYPE_NBYTES.get(entry["dtype"])
    except (KeyError, TypeError, ValueError):
        raise CiuicError(
            f"{path}: the header entry of {name} is damaged; download or copy it again."
        ) from None
    if element is not None and math.prod(shape) * element != nbytes:
        raise CiuicError(f"{path}: {name} claims shape {list(shape)} {entry['dtype']} in {nbytes:,} bytes.")
    return TensorHeader(name, entry["dtype"], shape, nbytes, path)


def check_files(files: Iterable[str | Path]) -> list[TensorHeader]:
    """Headers of all files, after checking that each is whole. Raises CiuicError."""
    return [
        tensor for file in files if str(file).endswith(".safetensors") for tensor in read_header(Path(file))
    ]


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory. Raises CiuicError when there is no such checkpoint."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return [directory / name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CiuicError(f"{index} is damaged; download or copy it again.") from None
    single = directory / "model.safetensors"
    if not single.is_file():
        raise CiuicError(
            f"{directory} is not a model: it has no model.safetensors and no model.safetensors.index.json."
        )
    return [single]


def read_config(directory: Path) -> dict:
    """config.json of a checkpoint directory. Raises CiuicError when there is none."""
    path = directory / "config.json"
    if not path.is_file():
        raise CiuicError(f"{directory} is not a model: it has no config.json.")
    try:
        config = json.loads(path.read_text())
    except ValueError:
        raise CiuicError(f"{path} is not valid JSON.") from None
    if not isinstance(config, dict):
        raise CiuicError(f"{path} must hold a JSON object.")
    return config
