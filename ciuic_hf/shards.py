"""Safetensors files that are laid out before a weight is read, and written tensor by tensor in any order."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ciuic_hf.errors import CiuicError


@dataclass(frozen=True)
class Slot:
    """The place of a tensor: ``nbytes`` from byte ``start`` of a file."""

    file: str
    start: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def stand_in(self) -> Tensor:
        """A tensor of this shape and dtype without contents."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def lay_out(
    file: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Slot]]:
    """Header of a file and the place of each tensor, as ``safetensors.torch.save_file`` would write them.

    Args:
        tensors: may be on the meta device; only shapes and dtypes count.
    """
    # The order of tensors is safetensors' own: it sorts by dtype and name, whatever the shapes.
    empty = save({name: torch.empty(0, dtype=t.dtype) for name, t in tensors.items()}, dict(metadata))
    (length,) = struct.unpack("<Q", empty[:8])
    header = json.loads(empty[8 : 8 + length])
    end = 0
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
            entry |= {"shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    prefix = struct.pack("<Q", len(text)) + text
    slots = {
        name: Slot(
            file,
            len(prefix) + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
            tuple(entry["shape"]),
            tensors[name].dtype,
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }
    return prefix, slots


class ShardFiles:
    """The files of a checkpoint while they are being written.

    Args:
        headers: file name -> header, from :func:`lay_out`.
        slots: tensor name -> place.
    """

    def __init__(self, directory: Path, headers: Mapping[str, bytes], slots: Mapping[str, Slot]) -> None:
        self.directory, self.headers, self.slots = directory, headers, slots
        self._open: tuple[str, FileIO] | None = None
        self._unsynced: set[str] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of all files when whole."""
        return sum(len(h) for h in self.headers.values()) + sum(s.nbytes for s in self.slots.values())

    def create(self) -> None:
        """Make every file at its full size; tensors are holes until they are written."""
        for file, size in self._sizes():
            with (self.directory / file).open("wb") as opened:
                opened.write(self.headers[file])
                opened.truncate(size)
            self._unsynced.add(file)
        self.sync()

    def check(self) -> None:
        """Raise CiuicError unless every file is there with its header and size."""
        for file, size in self._sizes():
            path, header = self.directory / file, self.headers[file]
            if path.is_file() and path.stat().st_size == size:
                with path.open("rb") as opened:
                    if opened.read(len(header)) == header:
                        continue
            raise CiuicError(
                f"{path} of the unfinished work is missing or damaged; begin anew with --restart (restart=True)."
            )

    def _sizes(self) -> Iterator[tuple[str, int]]:
        for file, header in self.headers.items():
            ends = [slot.start + slot.nbytes for slot in self.slots.values() if slot.file == file]
            yield file, max([len(header), *ends])

    def write(self, name: str, offset: int, part: Tensor) -> None:
        """Write bytes of a tensor from byte ``offset`` of it on. Raises CiuicError when the disk is full."""
        slot = self.slots[name]
        data = memoryview(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        assert offset + len(data) <= slot.nbytes
        opened = self._opened(slot.file)
        opened.seek(slot.start + offset)
        try:
            while data:
                data = data[opened.write(data) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise CiuicError(
                f"The disk of {self.directory} is full; free some space and repeat the command, which goes on "
                "where it stopped."
            ) from None

    def read(self, name: str) -> Tensor:
        """A tensor as it was written."""
        slot = self.slots[name]
        opened = self._opened(slot.file)
        opened.seek(slot.start)
        data = bytearray(opened.read(slot.nbytes))
        return torch.frombuffer(data, dtype=torch.uint8).view(slot.dtype).reshape(slot.shape)

    def _opened(self, file: str) -> FileIO:
        """The file; one is open at a time, as there may be more than a process may open."""
        if self._open is None or self._open[0] != file:
            self.close()
            self._open = file, FileIO(self.directory / file, "r+b")
        assert self._open is not None
        self._unsynced.add(file)
        return self._open[1]

    def sync(self) -> None:
        """Have everything that was written reach the disk."""
        for file in sorted(self._unsynced):
            with (self.directory / file).open("rb") as opened:
                os.fsync(opened.fileno())
        self._unsynced.clear()

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None
