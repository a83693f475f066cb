"""Rounding that knows what the weights are multiplied with: the error of one column is made good by later ones.

A row w of a matrix meets inputs x with second moments ``H = E[x x^T]``. Stored as q it is wrong by ``(w - q) x``, in
the mean square ``(w - q) H (w - q)^T``. Codes are chosen column by column: what column j cannot represent is passed on
to the columns after it in the way that is best for H, which is OPTQ (Frantar et al., arXiv 2210.17323), the same as
LDLQ (Chee et al., arXiv 2307.13304). With ``H^-1 = U^T U``, U upper triangular, the error of column j is
``e_j = (w_j - q_j) / U_jj``, the columns k > j lose ``e_j U_jk``, and the row's mean square is the sum of ``e_j^2``.

Here each group of columns tries its codec's scales, every one with the error passed on inside the group, and keeps
the one with the smallest sum. Blocks of different codecs pass errors on to each other; raw and zero blocks are encoded
at once. Sparse blocks keep the weights with the largest ``(w_j / U_jj)^2``, which is what a weight costs that is set to
zero and made good by later ones (SparseGPT, Frantar and Alistarh, arXiv 2301.00774); what is left out counts as the
error of a code of zero. A strip of 64 rows for which plain encoding does better keeps the plain bytes.

The format is not touched: what comes out are codes and scale bytes like any others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from ciuic_kernels.codec import Codec, GroupedCodec, PruningCodec, codec_by_id
from ciuic_kernels.codecs.grid import tree_sum
from ciuic_kernels.cpu import rounding as cpu
from ciuic_kernels.dispatch import use_native
from ciuic_kernels.format import BLOCK_COLS, BLOCK_ROWS, BlockGrid, PackedTensor
from ciuic_kernels.packing import decode_strips, edge_batches, encode_matrix, record_starts, scatter

DAMPING = 0.3  # of the mean of H's diagonal, added to it: a few thousand tokens know H badly (docs/adr/017)
CHUNK_WEIGHTS = {"cpu": 1 << 22}  # rounded at a time, of which about eight float32 copies are held
CHUNK_WEIGHTS_ELSEWHERE = 1 << 26  # a GPU waits for launches, of which a chunk needs some for every column


@dataclass(frozen=True)
class RoundingError:
    """Mean squared error of a matrix's outputs, summed over them: rounded to the nearest, and as it was stored.

    Attributes:
        nearest, stored: ``tr((W - Q) H (W - Q)^T)``, H damped.
    """

    nearest: float = 0.0
    stored: float = 0.0

    def __add__(self, other: RoundingError) -> RoundingError:
        return RoundingError(self.nearest + other.nearest, self.stored + other.stored)


def feedback_of(moments: Tensor, damping: float = DAMPING) -> Tensor:
    """U of the module docstring, float32 ``[K, K]``, on the device of the moments.

    Args:
        moments: H, ``[K, K]`` of a float dtype, symmetric and without negative eigenvalues.
        damping: times the mean of the diagonal, is added to the diagonal.

    Raises:
        ValueError: for moments that are not finite, or all zero.
    """
    damped = moments.double()
    mean = float(damped.diagonal().mean())
    if not 0 < mean < float("inf") or not bool(damped.isfinite().all()):
        raise ValueError("Moments of inputs must be finite and not all zero.")
    damped = damped / mean
    damped.diagonal().add_(damping)
    # H = R R^T with R upper triangular, by the usual factor with rows and columns in reverse; then U = R^-1.
    return (_inverse(torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)) * mean**-0.5).float()


def _inverse(upper: Tensor) -> Tensor:
    """Of an upper triangular matrix; by parts, as solving for all columns at once takes three times the operations."""
    inverse = torch.zeros_like(upper)
    for start in range(0, len(upper), 2 * BLOCK_COLS):
        end = min(start + 2 * BLOCK_COLS, len(upper))
        unit = torch.zeros_like(inverse[:end, start:end])
        unit[start:].fill_diagonal_(1)
        inverse[:end, start:end] = solve_triangular(upper[:end, :end], unit, upper=True)
    return inverse


def encode_matrix_rounded(
    packed: PackedTensor, offsets: Tensor, index: int, source: Tensor, feedback: Tensor, first_row: int = 0
) -> RoundingError:
    """Like :func:`~ciuic_kernels.packing.encode_matrix`, with codes and scales that suit the matrix's inputs.

    The same input gives the same bytes on one machine; sums of floats may differ on another.

    Args:
        feedback: float32 ``[K, K]`` from :func:`feedback_of`, on any device.

    Raises:
        NotFiniteError, ValueError, TypeError: as encode_matrix does, and for a feedback of another size.
    """
    if feedback.shape != (packed.grid.cols, packed.grid.cols):
        raise ValueError(
            f"The moments are of {feedback.shape[0]} inputs and the matrix [{packed.grid.rows}, {packed.grid.cols}] "
            f"has {packed.grid.cols}."
        )
    encode_matrix(packed, offsets, index, source, first_row)
    grid = packed.grid
    tags = packed.tags.view(grid.matrices, grid.strips, grid.kblocks, 2)[index]
    feedback = feedback.to(source.device)
    at_once = CHUNK_WEIGHTS.get(source.device.type, CHUNK_WEIGHTS_ELSEWHERE)
    rows = max(1, at_once // (grid.cols * BLOCK_ROWS)) * BLOCK_ROWS
    error = RoundingError()
    for start in range(0, source.shape[0], rows):
        chunk = source[start : start + rows].float()
        strip = (first_row + start) // BLOCK_ROWS
        here = slice(strip, strip + BlockGrid(tuple(chunk.shape)).strips)
        starts = offsets[index * grid.strips :][here.start : here.stop + 1]
        error += _round_rows(chunk, tags[here], starts, packed.arena, feedback)
    return error


def _round_rows(
    source: Tensor, tags: Tensor, offsets: Tensor, arena: Tensor, feedback: Tensor
) -> RoundingError:
    """Round whole strips that are encoded already, and replace those for which it helps.

    Args:
        source: float32 ``[rows, K]``.
        tags: uint8 ``[strips, kblocks, 2]`` of these rows.
        offsets: int64 ``[strips + 1]`` of these rows.
    """
    grid = BlockGrid((source.shape[0], source.shape[1]))
    plain = decode_strips(arena, tags, offsets, (grid.rows, grid.cols), range(grid.strips), torch.float32)
    nearest = _strip_sums(solve_triangular(feedback, source - plain, upper=True, left=False))
    del plain
    first, last = int(offsets[0]), int(offsets[-1])
    trial = PackedTensor((grid.rows, grid.cols), arena[first:last].clone(), tags.clone())
    rounded = _strip_sums(_encode_columns(source, trial, feedback))
    better = rounded < nearest  # not for a strip whose sum is NaN
    for strip in better.nonzero()[:, 0].tolist():
        record = slice(int(offsets[strip]), int(offsets[strip + 1]))
        arena[record] = trial.arena[record.start - first : record.stop - first]
        tags[strip] = trial.tags[strip]
    stored = torch.where(better, rounded, nearest)
    return RoundingError(float(nearest.sum()), float(stored.sum()))


def _strip_sums(errors: Tensor) -> Tensor:
    """float64 ``[strips]``: sums of squares of ``[rows, K]`` over strips."""
    rows = errors.double().square_().sum(1)
    return torch.nn.functional.pad(rows, (0, -len(rows) % BLOCK_ROWS)).view(-1, BLOCK_ROWS).sum(1)


def _encode_columns(source: Tensor, packed: PackedTensor, feedback: Tensor) -> Tensor:
    """Write records and exponents of all blocks into ``packed``, which has the codecs; returns e ``[rows, K]``."""
    grid, rest = packed.grid, source.clone()
    ids = packed.tags[..., 0].cpu()
    starts = record_starts(ids, grid, 0)
    compiled = cpu.CODECS if use_native(source.device) and cpu.available() else set()
    for kblock in range(grid.kblocks):
        end = min(grid.cols, (kblock + 1) * BLOCK_COLS)
        here = slice(kblock * BLOCK_COLS, end)
        upper = feedback[here, here]
        panel = rest[:, here]
        if compiled:
            cpu.round_grids(panel, packed.tags[:, kblock], starts[:, kblock], upper, packed.arena)
        for blocks, rows, cols, band, _ in edge_batches(panel, BlockGrid((grid.rows, panel.shape[1]))):
            for codec_id in set(ids[band, kblock].tolist()) - compiled:
                chosen = (ids[band, kblock] == codec_id).nonzero()[:, 0]
                on_device, codec = chosen.to(source.device), codec_by_id(codec_id)
                weights = blocks[on_device, 0]
                records, exponents = _encode_blocks(codec, weights, upper)
                packed.tags[band, kblock, 1][on_device] = exponents
                nbytes = codec.record_nbytes(rows, cols)
                scatter(packed.arena, starts[band, kblock][chosen], records, nbytes)
                wrong = (weights - codec.decode(records, exponents, rows, cols)).flatten(0, 1)
                errors = solve_triangular(upper, wrong, upper=True, left=False)
                blocks[on_device, 0] = errors.unflatten(0, (-1, rows))
        rest[:, end:].addmm_(panel, feedback[here, end:], alpha=-1)
    return rest


def _encode_blocks(codec: Codec, blocks: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Records and exponents of blocks float32 ``[B, rows, cols]``; ``upper`` is the feedback between their columns."""
    if isinstance(codec, PruningCodec):
        return _prune_blocks(codec, blocks, upper)
    if not isinstance(codec, GroupedCodec):
        return codec.encode(blocks)
    exponents = codec.exponents(blocks)
    rest = blocks.permute(2, 0, 1).clone(memory_format=torch.contiguous_format)  # columns first
    scales, codes = [], torch.empty(rest.shape, dtype=torch.uint8, device=rest.device)
    for first in range(0, len(rest), codec.group):
        here = slice(first, min(first + codec.group, len(rest)))
        scale, codes[here], errors = _round_group(codec, rest[here], exponents, upper[here, here])
        scales.append(scale)
        rest[here.stop :] -= torch.tensordot(upper[here, here.stop :], errors, dims=([0], [0]))
    return codec.pack(torch.stack(scales, dim=-1), codes.permute(1, 2, 0)), exponents


def _prune_blocks(codec: PruningCodec, blocks: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`_encode_blocks`. Scales are sought around those of the weights as they are made good unrounded."""
    stored = codec.stored(blocks.abs() / upper.diagonal())
    kept, columns = (x.permute(2, 0, 1).contiguous() for x in (stored, blocks))
    rest = columns.clone()
    for j in range(len(rest)):
        error = rest[j].masked_fill(kept[j], 0.0) / upper[j, j]
        rest[j + 1 :] -= upper[j, j + 1 :, None, None] * error
    goal = rest.masked_fill_(~kept, 0.0).permute(1, 2, 0).contiguous()
    exponents = codec.exponents(goal)
    scale_bytes, scales = codec.scale_candidates(goal, exponents)
    scale, codes, _ = _try_scales(codec, columns, scale_bytes, scales, upper, kept)
    return codec.pack_stored(scale, codes.permute(1, 2, 0), stored), exponents


def _round_group(
    codec: GroupedCodec, columns: Tensor, exponents: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One group of columns float32 ``[G, B, rows]``: scale bytes ``[B, rows]``, codes and errors ``[G, B, rows]``."""
    scale_bytes, scales = codec.scale_candidates(columns.movedim(0, -1), exponents)
    return _try_scales(codec, columns, scale_bytes, scales, upper)


def _try_scales(
    codec: GroupedCodec | PruningCodec,
    columns: Tensor,
    scale_bytes: Tensor,
    scales: Tensor,
    upper: Tensor,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best of the scales ``[C, B, rows]`` for columns ``[G, B, rows]``; all but ``kept`` of them become zero."""
    inverse = 1.0 / scales
    rest = columns.unsqueeze(1).repeat(1, len(scales), 1, 1)
    codes, errors = torch.empty(rest.shape, dtype=torch.uint8, device=rest.device), torch.empty_like(rest)
    for j in range(len(rest)):
        codes[j], values = codec.round(rest[j] * inverse)
        stored = values * scales
        if kept is not None:
            stored = stored.masked_fill(~kept[j], 0.0)
        torch.div(rest[j] - stored, upper[j, j], out=errors[j])
        rest[j + 1 :] -= upper[j, j + 1 :, None, None, None] * errors[j]
    squares = errors.square().movedim(0, -1)
    size = 1 << (len(rest) - 1).bit_length()
    best = tree_sum(torch.nn.functional.pad(squares, (0, size - len(rest)))).argmin(0, keepdim=True)
    scale = scale_bytes.gather(0, best)[0]
    best = best.expand(len(rest), *best.shape)
    return scale, codes.gather(1, best)[:, 0], errors.gather(1, best)[:, 0]
