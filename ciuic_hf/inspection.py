"""What a compressed checkpoint holds, read from its files alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ciuic_hf.checkpoint import (
    DTYPE_NBYTES,
    TensorHeader,
    check_files,
    checkpoint_files,
    is_shape,
    read_config,
)
from ciuic_hf.compressor.blocks import codec_counts
from ciuic_hf.errors import CiuicError
from ciuic_hf.modules.packed import TAGS
from ciuic_hf.report import CompressedParameter, KeptParameter, Report
from ciuic_kernels import BlockGrid
from ciuic_kernels.layout import FormatError, strip_offsets

VECTORS = "vectors (norms, biases)"


@dataclass(frozen=True)
class StoredTags:
    """One compressed parameter of a checkpoint, validated, without its weights.

    Attributes:
        tags: uint8 ``[..., strips, kblocks, 2]``.
        nbytes: arena and tags.
    """

    role: str
    shape: tuple[int, ...]
    tags: Tensor
    nbytes: int


def inspect_checkpoint(directory: Path | str) -> Report:
    """The report of a compressed checkpoint. Reads headers and tags, no weights.

    Raises:
        CiuicError: when the directory is no model, is not compressed by Ciuic, is incomplete, or when tags and
            sizes do not add up.
    """
    directory = Path(directory)
    config, headers = _read(directory)
    quantization = config["quantization_config"]
    dense_nbytes = _dense_element_nbytes(config)
    compressed = [
        _parameter(name, stored, dense_nbytes) for name, stored in _stored(quantization, headers).items()
    ]
    owned = {p.name for p in compressed} | {p.name + TAGS for p in compressed}
    reasons = quantization.get("kept", {})
    kept = [
        KeptParameter(name, str(reasons.get(name, VECTORS)), math.prod(header.shape), header.nbytes)
        for name, header in headers.items()
        if name not in owned
    ]
    return Report(compressed, kept, source=str(directory))


def read_tags(directory: Path | str) -> dict[str, StoredTags]:
    """The tags of all compressed parameters by name, tied ones once. Raises CiuicError as inspect_checkpoint."""
    config, headers = _read(Path(directory))
    return _stored(config["quantization_config"], headers)


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, TensorHeader]]:
    config = read_config(directory)
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != "ciuic":
        method = quantization.get("quant_method", "not compressed")
        raise CiuicError(f"{directory} is {method}; ciuic inspect reads checkpoints that Ciuic saved.")
    return config, {header.name: header for header in check_files(checkpoint_files(directory))}


def _dense_element_nbytes(config: dict[str, Any]) -> int:
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return 4 if dtype == "float32" else 2


def _stored(quantization: dict[str, Any], headers: dict[str, TensorHeader]) -> dict[str, StoredTags]:
    found = {}
    for name, entry in quantization.get("parameters", {}).items():
        if not isinstance(entry, dict) or not is_shape(entry.get("shape")):
            raise CiuicError(f"config.json describes {name} as {entry!r}; it needs a shape.")
        if name in headers:
            found[name] = _tags(name, entry, headers)
    return found


def _tags(name: str, entry: dict[str, Any], headers: dict[str, TensorHeader]) -> StoredTags:
    shape, arena = tuple(entry["shape"]), headers[name]
    header = headers.get(name + TAGS)
    if header is None:
        raise CiuicError(f"{arena.file} holds {name} without {name}{TAGS}; the checkpoint is incomplete.")
    with safe_open(header.file, framework="pt") as file:
        tags = file.get_tensor(name + TAGS)
    try:
        strip_offsets(tags, BlockGrid(shape), arena.nbytes // DTYPE_NBYTES["U8"])
    except FormatError as error:
        raise CiuicError(f"{name} in {arena.file}: {error}") from None
    return StoredTags(str(entry.get("role", "linear")), shape, tags, arena.nbytes + header.nbytes)


def _parameter(name: str, stored: StoredTags, element_nbytes: int) -> CompressedParameter:
    weights = math.prod(stored.shape)
    return CompressedParameter(
        name=name,
        role=stored.role,
        shape=stored.shape,
        weights=weights,
        nbytes=stored.nbytes,
        dense_nbytes=weights * element_nbytes,
        codecs=codec_counts(stored.tags),
    )
