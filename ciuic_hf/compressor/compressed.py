"""``CompressedTensor``: one tensor in compressed blocks, or as it is where blocks cannot hold it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ciuic_hf.compressor.blocks import codec_counts
from ciuic_hf.errors import CiuicError
from ciuic_hf.report import human_bytes
from ciuic_kernels import FORMAT_VERSION, PackedTensor
from ciuic_kernels.layout import FormatError, validate

ARENA, TAGS, RAW, HEADER = "arena", "tags", "raw", "header"
_HEADER_FIELDS = {"format_version", "shape", "dtype", "kind", "matrix", "mean", "why_raw"}
MEAN_NBYTES = 4


@dataclass(frozen=True, repr=False)
class CompressedTensor:
    """What ``CiuicCompressor`` makes of a tensor; it owns its bytes and shares none with the source.

    Attributes:
        shape: of the source.
        dtype: of the source, by name: ``"bfloat16"``, ``"int64"``.
        kind: ``"torch"`` or ``"numpy"``, what decompressing returns.
        packed: the blocks of the source as a matrix (in row-major order, zeros behind its last element), or None.
        raw: uint8 ``[nbytes]``, the source's own bytes where it is kept exactly, or None.
        mean: what was subtracted before encoding and is added after decoding; 0 for most tensors.
        why_raw: why the bytes were kept.
    """

    shape: tuple[int, ...]
    dtype: str
    kind: str
    packed: PackedTensor | None = None
    raw: Tensor | None = None
    mean: float = 0.0
    why_raw: str = ""

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Everything stored: records, padding, tags, mean; or the bytes that were kept."""
        if self.packed is None:
            assert self.raw is not None
            return self.raw.numel()
        return self.packed.nbytes + (MEAN_NBYTES if self.mean else 0)

    @property
    def original_nbytes(self) -> int:
        return self.numel * self.torch_dtype.itemsize

    @property
    def compression_ratio(self) -> float:
        """Stored bytes / original bytes; 1 for a tensor without elements."""
        return self.nbytes / self.original_nbytes if self.numel else 1.0

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each element; 0 for a tensor without elements."""
        return 8 * self.nbytes / self.numel if self.numel else 0.0

    @property
    def codecs(self) -> dict[str, int]:
        """Codec name -> number of blocks; empty for kept bytes."""
        return codec_counts(self.packed.tags) if self.packed is not None else {}

    @property
    def device(self) -> torch.device:
        tensor = self.packed.arena if self.packed is not None else self.raw
        assert tensor is not None
        return tensor.device

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that hold everything, for ``safetensors`` or ``torch.save``; shares memory with this object."""
        header: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "kind": self.kind,
            "matrix": list(self.packed.shape) if self.packed is not None else None,
            "mean": self.mean,
            "why_raw": self.why_raw,
        }
        state = {HEADER: torch.tensor(list(json.dumps(header).encode()), dtype=torch.uint8)}
        if self.packed is not None:
            return state | {ARENA: self.packed.arena, TAGS: self.packed.tags}
        assert self.raw is not None
        return state | {RAW: self.raw}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Self:
        """The inverse of ``state_dict``, on the device of its tensors.

        Raises:
            CiuicError: when entries are missing, unknown, of another version, or do not add up.
        """
        header = _read_header(state)
        shape = tuple(header["shape"])
        common: dict[str, Any] = {"shape": shape, "dtype": header["dtype"], "kind": header["kind"]}
        expected = {HEADER, RAW} if header["matrix"] is None else {HEADER, ARENA, TAGS}
        if set(state) != expected:
            raise CiuicError(
                f"This compressed tensor needs the entries {', '.join(sorted(expected))}, got "
                f"{', '.join(sorted(state))}."
            )
        if header["matrix"] is None:
            compressed = cls(**common, raw=state[RAW], why_raw=header["why_raw"])
            raw = state[RAW]
            if raw.dtype != torch.uint8 or raw.dim() != 1 or raw.numel() != compressed.original_nbytes:
                raise CiuicError(
                    f"A tensor {list(shape)} of {header['dtype']} has {compressed.original_nbytes} bytes, the entry "
                    f"{RAW!r} is {raw.dtype} {list(raw.shape)}; the file is damaged."
                )
            return compressed
        packed = PackedTensor(tuple(header["matrix"]), state[ARENA], state[TAGS])
        compressed = cls(**common, packed=packed, mean=header["mean"])
        try:
            spare = packed.grid.numel - compressed.numel
            validate(packed)
        except (FormatError, ValueError) as error:
            raise CiuicError(f"This compressed tensor is damaged: {error}") from None
        if not 0 <= spare < packed.shape[0] or not compressed.torch_dtype.is_floating_point:
            raise CiuicError(
                f"A matrix {header['matrix']} does not hold a tensor {list(shape)} of {header['dtype']}; "
                "the entries belong to different tensors."
            )
        return compressed

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Self:
        """Read what ``save`` wrote. Raises CiuicError for a file that is not one, or is damaged."""
        try:
            state = load_file(path, device=str(device))
        except SafetensorError as error:
            raise CiuicError(f"{path} is not a whole safetensors file ({error}); write it again.") from None
        return cls.from_state_dict(state)

    def to(self, device: str | torch.device) -> CompressedTensor:
        """The same on another device."""
        packed = self.packed and PackedTensor(
            self.packed.shape, self.packed.arena.to(device), self.packed.tags.to(device)
        )
        raw = None if self.raw is None else self.raw.to(device)
        return CompressedTensor(
            self.shape, self.dtype, self.kind, packed, raw, mean=self.mean, why_raw=self.why_raw
        )

    def __repr__(self) -> str:
        what = f"CompressedTensor({self.kind} {self.dtype} {list(self.shape)}: "
        if self.packed is None:
            return f"{what}{human_bytes(self.nbytes)} kept as they are, {self.why_raw})"
        shares = sorted(self.codecs.items(), key=lambda item: -item[1])
        blocks = ", ".join(f"{100 * n / self.packed.grid.blocks:.0f}% {name}" for name, n in shares)
        mean = f", around {self.mean:g}" if self.mean else ""
        return (
            f"{what}{self.bits_per_weight:.2f} bits per weight, {human_bytes(self.nbytes)} of "
            f"{human_bytes(self.original_nbytes)}, {blocks}{mean})"
        )


def _read_header(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The header of a state dict with its types checked. Raises CiuicError."""
    if HEADER not in state:
        raise CiuicError(
            f"This is no compressed tensor: it has {', '.join(sorted(state)) or 'nothing'} and no {HEADER!r}."
        )
    try:
        header = json.loads(bytes(state[HEADER].tolist()))
    except (TypeError, ValueError):
        header = None
    if not isinstance(header, dict) or set(header) != _HEADER_FIELDS:
        raise CiuicError("The header of this compressed tensor is damaged; write it again.")
    if header["format_version"] != FORMAT_VERSION:
        raise CiuicError(
            f"This compressed tensor has format version {header['format_version']}, this ciuic_hf reads "
            f"{FORMAT_VERSION}; upgrade ciuic-hf."
        )
    shape, matrix, dtype = header["shape"], header["matrix"], getattr(torch, str(header["dtype"]), None)
    if (
        not _are_sizes(shape)
        or not (matrix is None or (_are_sizes(matrix) and len(matrix) == 2))
        or not isinstance(dtype, torch.dtype)
        or header["kind"] not in ("torch", "numpy")
        or not isinstance(header["mean"], int | float)
        or not math.isfinite(header["mean"])
    ):
        raise CiuicError(f"The header of this compressed tensor is damaged ({header}); write it again.")
    return header


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(size, int) and size >= 0 for size in value)
