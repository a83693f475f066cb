"""The contract of a block codec and the registry of all codecs.

A codec says how one block is stored. It is one file in ``ciuic_kernels/codecs`` that registers itself, and one line
in its ``__init__``; encoding, decoding, planning, reports and conformance tests then know it. The compiled CPU
kernels serve a codec once ``cpu/blocks.c`` has code for it; until then the torch reference serves that machine.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import Protocol, TypeVar, runtime_checkable

from torch import Tensor


@runtime_checkable
class Codec(Protocol):
    """How one block ``[rows, cols]`` becomes one record of bytes.

    Attributes:
        id: the codec's tag byte, 0..255, part of the checkpoint format.
        name: the name users write in ``modules={...}``, such as ``grid4_g32``.
        bits: bits per weight of a full block, scales included, tags excluded.
    """

    @property
    def id(self) -> int: ...

    @property
    def name(self) -> str: ...

    @property
    def bits(self) -> float: ...

    def record_nbytes(self, rows: int, cols: int) -> int:
        """Bytes of one record before alignment; a pure function of the size of the block."""
        ...

    def encode(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a batch of equal-sized blocks.

        Args:
            blocks: float32 ``[B, rows, cols]``, finite.

        Returns:
            records uint8 ``[B, record_nbytes]`` and scale exponents uint8 ``[B]``.
        """
        ...

    def decode(self, records: Tensor, exponents: Tensor, rows: int, cols: int) -> Tensor:
        """The inverse: records uint8 ``[B, record_nbytes]`` -> float32 ``[B, rows, cols]``."""
        ...


@runtime_checkable
class GroupedCodec(Codec, Protocol):
    """A codec of codes on one grid, with a scale for each row and group of columns, that can be rounded code by code.

    :mod:`ciuic_kernels.rounding` chooses scales and codes for it, knowing what the weights are multiplied with.

    Attributes:
        group: columns that share a scale.
    """

    @property
    def group(self) -> int: ...

    def exponents(self, blocks: Tensor) -> Tensor:
        """uint8 ``[B]`` for blocks float32 ``[B, rows, cols]`` whose columns may still change a little."""
        ...

    def scale_candidates(self, groups: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
        """Scales to try for groups float32 ``[B, rows, G]``: their bytes uint8 and values float32 ``[C, B, rows]``."""
        ...

    def round(self, ratios: Tensor) -> tuple[Tensor, Tensor]:
        """Of weights divided by their scales: the codes, uint8, and what they stand for, float32."""
        ...

    def pack(self, scales: Tensor, codes: Tensor) -> Tensor:
        """Records of scale bytes uint8 ``[B, rows, groups]`` and codes uint8 ``[B, rows, cols]``."""
        ...


@runtime_checkable
class PruningCodec(Codec, Protocol):
    """A codec that stores some weights of a block, as codes on one grid with a scale for each row; the others are 0.

    :mod:`ciuic_kernels.rounding` chooses them for it, knowing what the weights are multiplied with.
    """

    def stored(self, importance: Tensor) -> Tensor:
        """Which weights are stored: bool like ``importance``, float32 ``[B, rows, cols]``, at least 0."""
        ...

    def exponents(self, blocks: Tensor) -> Tensor:
        """uint8 ``[B]`` for blocks float32 ``[B, rows, cols]`` whose weights may still change a little."""
        ...

    def scale_candidates(self, groups: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
        """Scales to try for rows float32 ``[B, rows, cols]``: their bytes uint8 and values float32 ``[C, B, rows]``."""
        ...

    def round(self, ratios: Tensor) -> tuple[Tensor, Tensor]:
        """Of weights divided by their scales: the codes, uint8, and what they stand for, float32."""
        ...

    def pack_stored(self, scales: Tensor, codes: Tensor, stored: Tensor) -> Tensor:
        """Records of scale bytes uint8 ``[B, rows]`` and of the codes uint8 ``[B, rows, cols]`` that are stored."""
        ...


_BY_ID: dict[int, Codec] = {}
_BY_NAME: dict[str, Codec] = {}


AnyCodec = TypeVar("AnyCodec", bound=Codec)


def register_codec(codec: AnyCodec) -> AnyCodec:
    """Make a codec known. Raises ValueError when its id or name is taken."""
    if codec.id in _BY_ID or codec.name in _BY_NAME:
        raise ValueError(f"Codec id {codec.id} or name {codec.name!r} is registered twice.")
    _BY_ID[codec.id] = codec
    _BY_NAME[codec.name] = codec
    return codec


def codec_by_id(codec_id: int) -> Codec:
    """The codec of a tag byte. Raises ValueError for an unknown id."""
    if codec_id not in _BY_ID:
        raise ValueError(
            f"Block tag {codec_id} is not a codec of this version; known tags are {_runs(sorted(_BY_ID))}. "
            "The file is damaged or was written by a newer ciuic_hf."
        )
    return _BY_ID[codec_id]


def codec_by_name(name: str) -> Codec:
    """The codec that a user named. Raises ValueError with the list of names."""
    if name not in _BY_NAME:
        raise ValueError(f"No codec is named {name!r}; choose one of {_families(all_codecs())}.")
    return _BY_NAME[name]


def codec_count() -> int:
    """How many codecs are registered."""
    return len(_BY_ID)


def _runs(numbers: list[int]) -> str:
    """Ascending numbers in a sentence: ``0 to 2, 34``."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def _families(codecs: list[Codec]) -> str:
    """Names in a sentence. Of names that differ in their last number only, the first and the last stand for all."""
    families: dict[str, list[str]] = {}
    for codec in codecs:
        families.setdefault(re.sub(r"\d+$", "", codec.name), []).append(codec.name)
    return ", ".join(
        f"{names[0]} to {names[-1]}" if len(names) > 2 else ", ".join(names)
        for _, names in sorted(families.items())
    )


def all_codecs() -> list[Codec]:
    """Every registered codec, by id."""
    return [_BY_ID[i] for i in sorted(_BY_ID)]
