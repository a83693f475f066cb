"""Destinations of an offline compression: a rehearsal that reads no weights, and files that are written as they come.

The rehearsal is a load like any other, but what arrives is only checked and measured. It finds whatever is wrong with
a checkpoint that headers can tell, and leaves a model on the meta device that knows what it will consist of.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ciuic_hf.hf.destination import Destination, Stack
from ciuic_hf.hf.encoder import Encoder, Recipe
from ciuic_hf.hf.rounding import Feedback
from ciuic_hf.journal import Journal
from ciuic_hf.memory import release_freed_memory
from ciuic_hf.modules.packed import TAGS
from ciuic_hf.shards import ShardFiles
from ciuic_kernels import BlockGrid
from ciuic_kernels.format import BLOCK_ROWS, ceil_div
from ciuic_kernels.layout import arena_nbytes, planned_offsets
from ciuic_kernels.packing import allocate

PIECE_WEIGHTS = 1 << 24  # encoded and written at a time: at most 32 MB
SYNC_NBYTES, SYNC_SECONDS = 256 << 20, 5.0  # what a crash can lose
Source = tuple[Tensor, Tensor | None]


class Rehearsal(Destination):
    """Everything is checked and nothing is kept: the model ends up on the meta device, tags apart.

    Attributes:
        codec_ids: parameter name -> the codec of every block.
        duplicates: names of tied parameters that the files hold a second time, with the same values.
    """

    def __init__(self) -> None:
        self.codec_ids: dict[str, Tensor] = {}
        self.duplicates: set[str] = set()
        self._tied: dict[str, Source] = {}

    def encoder(self, recipe: Recipe) -> Encoder:
        self.codec_ids[recipe.name] = recipe.codec_ids
        return RehearsedEncoder(replace(recipe, rounding=None))

    def stack(self, name: str, placeholder: Tensor) -> Stack:
        return RehearsedStack(placeholder)

    def holds_tied(self, model: Any, name: str, weight: Tensor, scale: Tensor | None) -> bool:
        ties: dict[str, str] = model.all_tied_weights_keys
        if name not in ties and name not in ties.values():
            return False
        self._tied[name] = weight, scale
        pairs = [(target, source) for target, source in ties.items() if name in (target, source)]
        for target, source in pairs:
            other = source if name == target else target
            if other not in self._tied:
                continue
            if _equal(self._tied[other], (weight, scale)):
                self.duplicates.add(name)
                return True
            ties.pop(target)  # as transformers does when it sees that they differ
            ties.pop(target + TAGS, None)
        return False

    def arrived(self, name: str, tensor: Tensor) -> Tensor:
        if name.removesuffix(TAGS) in self.codec_ids and name.endswith(TAGS):
            return tensor
        return _without_contents(tensor)


def _equal(one: Source, other: Source) -> bool:
    return all(
        (a is None) == (b is None) and (a is None or b is None or (a.dtype == b.dtype and torch.equal(a, b)))
        for a, b in zip(one, other, strict=True)
    )


def _without_contents(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


class RehearsedEncoder(Encoder):
    """Checks shapes, dtypes and grids of scales, and encodes nothing."""

    def _encode(
        self, index: int, start: int, weight: Tensor, scale: Tensor | None, feedback: Feedback | None
    ) -> None:
        self._float_rows(weight, scale, whole=False)

    def finish(self) -> dict[str, Tensor]:
        tags = torch.zeros(self.grid.tags_shape, dtype=torch.uint8)  # exponents are not known
        tags[..., 0] = self.codec_ids
        nbytes = arena_nbytes(self.codec_ids, self.grid)
        return {
            self.name: torch.empty(nbytes, dtype=torch.uint8, device="meta"),
            self.name + TAGS: tags,
        }


class RehearsedStack(Stack):
    def add(self, index: int, expert: Tensor) -> None:
        pass

    def finish(self) -> Tensor:
        return _without_contents(self._placeholder)


class Streaming(Destination):
    """Writes every parameter to its place in the files of a checkpoint, in pieces, and records what is finished.

    Args:
        stored_names: parameter name -> its name in the files.
        duplicates: from the rehearsal.
        advanced: called with the bytes that were written; those of finished parts come at the start.
    """

    def __init__(
        self,
        files: ShardFiles,
        journal: Journal,
        stored_names: Mapping[str, str],
        duplicates: set[str],
        advanced: Callable[[int], None],
    ) -> None:
        self.files, self.journal, self.duplicates = files, journal, duplicates
        self._stored_names, self._advanced = stored_names, advanced
        self._unrecorded: set[str] = set()
        self._unsynced_nbytes, self._synced = 0, time.monotonic()
        advanced(sum(files.slots[name].nbytes for name in journal.done))

    def encoder(self, recipe: Recipe) -> Encoder:
        return StreamedEncoder(recipe, self)

    def stack(self, name: str, placeholder: Tensor) -> Stack:
        return StreamedStack(name, placeholder, self)

    def is_done(self, name: str) -> bool:
        """Whether a tensor is in the files."""
        stored = self._stored_names[name]
        return stored in self.journal.done or stored in self._unrecorded

    def finished(self, name: str) -> dict[str, Tensor] | None:
        names = [n for n in (name, name + TAGS) if n in self._stored_names]
        return {n: self._stand_in(n) for n in names} if names and all(map(self.is_done, names)) else None

    def holds_tied(self, model: Any, name: str, weight: Tensor, scale: Tensor | None) -> bool:
        return name in self.duplicates

    def arrived(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._stored_names:  # a model may name parameters that it does not save
            return _without_contents(tensor)
        if tensor.device.type != "meta" and not self.is_done(name):
            self.write(name, 0, tensor)
            self.finish(name)
        return self._stand_in(name)

    def _stand_in(self, name: str) -> Tensor:
        """Tags are small and say what a parameter became, so the model gets them."""
        stored = self._stored_names[name]
        is_tags = name.endswith(TAGS) and name.removesuffix(TAGS) in self._stored_names
        return self.files.read(stored) if is_tags else self.files.slots[stored].stand_in()

    def write(self, name: str, offset: int, part: Tensor) -> None:
        """Write a part of a parameter from byte ``offset`` of it on."""
        self.files.write(self._stored_names[name], offset, part)
        nbytes = part.numel() * part.element_size()
        self._unsynced_nbytes += nbytes
        self._advanced(nbytes)

    def finish(self, *names: str) -> None:
        """Everything of these parameters is written."""
        self._unrecorded |= {self._stored_names[name] for name in names}
        if self._unsynced_nbytes > SYNC_NBYTES or time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Bring what was written to disk, then record the parameters that are finished."""
        self.files.sync()
        self.journal.add(self._unrecorded)
        self._unrecorded.clear()
        self._unsynced_nbytes, self._synced = 0, time.monotonic()


class StreamedEncoder(Encoder):
    """Encodes some strips at a time and writes their records where they belong in the arena."""

    def __init__(self, recipe: Recipe, destination: Streaming) -> None:
        super().__init__(recipe)
        self._destination = destination
        self._offsets = planned_offsets(self.codec_ids, self.grid)
        self._tags = torch.empty(self.grid.tags_shape, dtype=torch.uint8)

    def _store(self, index: int, first: int, rows: Tensor, feedback: Feedback | None) -> None:
        step = max(1, PIECE_WEIGHTS // (self.grid.cols * BLOCK_ROWS)) * BLOCK_ROWS
        for start in range(0, rows.shape[0], step):
            self._store_piece(index, first + start, rows[start : start + step], feedback)

    def _store_piece(self, index: int, first: int, rows: Tensor, feedback: Feedback | None) -> None:
        grid, strip = self.grid, first // BLOCK_ROWS
        strips = slice(strip, strip + ceil_div(rows.shape[0], BLOCK_ROWS))
        ids = self.codec_ids if self.codec_ids.dim() == 2 else self.codec_ids[index]
        piece, offsets = allocate(ids[strips], BlockGrid(tuple(rows.shape)), rows.device)
        self._put(piece, offsets, 0, rows, feedback)
        self._tags.view(grid.matrices, grid.strips, grid.kblocks, 2)[index, strips] = piece.tags
        self._destination.write(self.name, int(self._offsets[index * grid.strips + strip]), piece.arena)

    def finish(self) -> dict[str, Tensor]:
        release_freed_memory()
        tags = self.name + TAGS
        self._destination.write(tags, 0, self._tags)
        self._destination.finish(self.name, tags)
        nbytes = int(self._offsets[-1])
        return {self.name: torch.empty(nbytes, dtype=torch.uint8, device="meta"), tags: self._tags}


class StreamedStack(Stack):
    """Writes each expert where it belongs."""

    def __init__(self, name: str, placeholder: Tensor, destination: Streaming) -> None:
        super().__init__(placeholder)
        self.name, self._destination = name, destination

    def add(self, index: int, expert: Tensor) -> None:
        expert = expert.to(self._placeholder.dtype).expand(self._placeholder.shape[1:])
        nbytes = expert.numel() * expert.element_size()
        self._destination.write(self.name, index * nbytes, expert)

    def finish(self) -> Tensor:
        self._destination.finish(self.name)
        return _without_contents(self._placeholder)
