"""What a compressed checkpoint holds, read from its files alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ciuic_hf.checkpoint import DTYPE_NBYTES, TensorHeader, check_files, checkpoint_files, read_config
from ciuic_hf.compressor.blocks import codec_counts
from ciuic_hf.errors import CiuicError
from ciuic_hf.modules.packed import TAGS
from ciuic_hf.report import CompressedParameter, KeptParameter, Report
from ciuic_kernels import BlockGrid
from ciuic_kernels.layout import FormatError, strip_offsets

VECTORS = "vectors (norms, biases)"


def inspect_checkpoint(directory: Path | str) -> Report:
    """The report of a compressed checkpoint. Reads headers and tags, no weights.

    Raises:
        CiuicError: when the directory is no model, is not compressed by Ciuic, is incomplete, or when tags and
            sizes do not add up.
    """
    directory = Path(directory)
    config = read_config(directory)
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != "ciuic":
        method = quantization.get("quant_method", "not compressed")
        raise CiuicError(f"{directory} is {method}; ciuic inspect reads checkpoints that Ciuic saved.")
    headers = {header.name: header for header in check_files(checkpoint_files(directory))}
    dense_nbytes = _dense_element_nbytes(config)
    compressed = [
        _parameter(name, entry, headers, dense_nbytes)
        for name, entry in quantization.get("parameters", {}).items()
        if name in headers
    ]
    owned = {p.name for p in compressed} | {p.name + TAGS for p in compressed}
    reasons = quantization.get("kept", {})
    kept = [
        KeptParameter(name, reasons.get(name, VECTORS), math.prod(header.shape), header.nbytes)
        for name, header in headers.items()
        if name not in owned
    ]
    return Report(compressed, kept, source=str(directory))


def _dense_element_nbytes(config: dict[str, Any]) -> int:
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return 4 if dtype == "float32" else 2


def _parameter(
    name: str, entry: dict[str, Any], headers: dict[str, TensorHeader], element_nbytes: int
) -> CompressedParameter:
    shape, arena = tuple(entry["shape"]), headers[name]
    tags_header = headers.get(name + TAGS)
    if tags_header is None:
        raise CiuicError(f"{arena.file} holds {name} without {name}{TAGS}; the checkpoint is incomplete.")
    with safe_open(tags_header.file, framework="pt") as file:
        tags = file.get_tensor(name + TAGS)
    try:
        strip_offsets(tags, BlockGrid(shape), arena.nbytes // DTYPE_NBYTES["U8"])
    except FormatError as error:
        raise CiuicError(f"{name} in {arena.file}: {error}") from None
    weights = math.prod(shape)
    return CompressedParameter(
        name=name,
        role=entry.get("role", "linear"),
        shape=shape,
        weights=weights,
        nbytes=arena.nbytes + tags_header.nbytes,
        dense_nbytes=weights * element_nbytes,
        codecs=codec_counts(tags),
    )
