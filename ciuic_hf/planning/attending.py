"""What is alive while attention is computed, on each of its paths, for a piece of a prompt.

A piece of C tokens attends to all that are cached. Where it is the whole prompt, history is its own keys and values and
torch hides the future by itself. Where it comes after others, transformers makes a mask ``[B, 1, C, context]``, which
lives through all layers; with one, sdpa wants keys and values repeated for every head, and the mask as numbers; MLA
expands its history for every piece; a cache that grows by concatenation holds a layer's keys twice for a moment.

A CiuicCache is read tile by tile without a mask. Of grouped heads what lives beside queries and results in float32 is
the Hadamard transform of the results, or a tile with its scores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ciuic_hf.planning.cache_formats import cache_formats
from ciuic_hf.planning.tiles import TILE, LatentShape, TiledPass, tile_tokens

if TYPE_CHECKING:
    from ciuic_hf.planning.memory import Run, Sizes

BAND_WEIGHTS = {"cpu": 4 << 20, "cuda": 64 << 20}
"""Of ciuic_kernels.ops: weights that a product decodes at a time."""
_SCORE_NBYTES = 12  # of a tile's scores: those formed, and scores or weights of this turn and the one before
_ROTATING = 3  # float32 copies of a tile of latents, while it is turned back
_TURNED = 4  # results in float32, while a Hadamard transform sums, subtracts and stacks them


@dataclass(frozen=True)
class Piece:
    """Tokens of a prompt that go through the model together.

    Attributes:
        queries: of each sequence.
        context: that each has cached, these among them.
        batch: sequences.
    """

    queries: int
    context: int
    batch: int

    @property
    def tokens(self) -> int:
        return self.batch * self.queries

    @property
    def cached(self) -> int:
        return self.batch * self.context

    @property
    def is_whole(self) -> bool:
        return self.queries == self.context


def mask_nbytes(sizes: Sizes, run: Run, piece: Piece) -> int:
    """Of the mask that a piece after others has, through all layers."""
    if piece.is_whole or run.reads_tiles(sizes):
        return 0
    return piece.tokens * piece.context * (run.element_nbytes if run.path_of(sizes) == "eager" else 1)


def attention_nbytes(sizes: Sizes, run: Run, piece: Piece) -> int:
    """While attention of a piece to everything cached is computed; without its mask."""
    indexer = piece.tokens * 4 * piece.context * (sizes.index_width + sizes.index_heads)
    if run.path_of(sizes) == "tiled":
        return indexer + _latent_tiles_nbytes(sizes, run, piece)
    nbytes = indexer + piece.tokens * run.element_nbytes * (3 * sizes.hidden + _alive(sizes, run, piece))
    if run.reads_tiles(sizes) and not piece.is_whole:
        return nbytes + _grouped_tiles_nbytes(sizes, run, piece)
    return nbytes + max(_growing_nbytes(sizes, run, piece), _computing_nbytes(sizes, run, piece))


def _alive(sizes: Sizes, run: Run, piece: Piece) -> int:
    """Elements of one token of the piece in queries, new keys and values, and results."""
    queries, outputs = sizes.heads * sizes.key_width, sizes.heads * sizes.value_width
    eager = run.path_of(sizes) == "eager"
    if sizes.latent:
        return 2 * queries + sizes.heads * sizes.rotary + 2 * sizes.cached + (0 if eager else outputs)
    repeated = 2 * queries if eager and piece.is_whole else 0
    return repeated + (1 if eager else 4) * queries + 2 * sizes.shared * sizes.key_width


def _growing_nbytes(sizes: Sizes, run: Run, piece: Piece) -> int:
    """Of a layer's keys before they had those of the piece."""
    width = sizes.latent or sizes.shared * sizes.key_width
    return run.element_nbytes * (piece.cached - piece.tokens) * width


def _computing_nbytes(sizes: Sizes, run: Run, piece: Piece) -> int:
    """History as the heads want it, and scores."""
    element, path, pairs = run.element_nbytes, run.path_of(sizes), piece.tokens * piece.context
    queries, outputs = sizes.heads * sizes.key_width, sizes.heads * sizes.value_width
    nbytes = element * piece.cached * sizes.expanded
    if not piece.is_whole and not sizes.latent and sizes.shared < sizes.heads:
        nbytes += element * piece.cached * 2 * queries
    if path == "math":  # scores before and after softmax, and a mark for each that is minus infinity
        nbytes += 4 * (2 * piece.tokens * queries + piece.cached * (queries + outputs))
        nbytes += pairs * ((4 + 4 + 1) * sizes.heads + 4)
    elif path == "eager":  # a CPU converts to float32 before softmax, a GPU while it reads
        converted = 4 if run.device == "cpu" else element
        nbytes += pairs * (element + 4 + converted) * sizes.heads + (element * pairs if piece.is_whole else 0)
    elif not piece.is_whole:  # the mask as numbers, which a GPU pads to whole rows of eight
        nbytes += pairs * element * (1 if run.device == "cpu" else 2)
    return nbytes


def _grouped_tiles_nbytes(sizes: Sizes, run: Run, piece: Piece) -> int:
    assert run.cache_bits is not None
    compute = 4 if run.device == "cpu" else run.element_nbytes
    queries = compute * piece.tokens * sizes.heads * sizes.key_width
    results = 4 * piece.tokens * sizes.heads * sizes.value_width
    formats = cache_formats(run.cache_bits, latent=False)
    width = piece.batch * sizes.shared * (sizes.key_width + sizes.value_width)
    tile = min(piece.context, tile_tokens(TILE // (2 * width), formats.group))
    of_query = piece.batch * sizes.heads * tile
    scores = of_query * min(piece.queries, max(1, TILE // of_query))
    working = results + compute * tile * width + _SCORE_NBYTES * scores
    return queries + max(working, _TURNED * results if formats.values.rotates else 0)


def _latent_tiles_nbytes(sizes: Sizes, run: Run, piece: Piece) -> int:
    """Few tokens take more when absorbed than many that are expanded, and may come in any turn."""
    element, queries = run.element_nbytes, piece.queries
    shape = LatentShape(sizes.latent, sizes.key_width - sizes.rotary, sizes.rotary, sizes.value_width)
    alive = 3 * sizes.hidden + 2 * sizes.heads * sizes.key_width + sizes.heads * sizes.rotary
    of_token = element * piece.batch * (alive + 2 * sizes.cached)
    absorbed = shape.most_absorbed(queries)
    computed = 4 if run.device == "cpu" else element
    assert run.cache_bits is not None
    formats, band = cache_formats(run.cache_bits, latent=True), BAND_WEIGHTS[run.device]
    history = absorbed if piece.is_whole else piece.context
    made = TiledPass(
        shape, sizes.heads, piece.batch, absorbed, history, element, computed, band, formats.keys.rotates,
        formats.group,
    )  # fmt: skip
    nbytes = absorbed * of_token + made.absorbed_nbytes()
    if absorbed < queries:
        weights = sizes.heads * (shape.nope + shape.value) * sizes.latent
        expanding = replace(made, queries=queries, context=piece.context).expanded_nbytes(weights)
        nbytes = max(nbytes, queries * of_token + expanding)
    if piece.is_whole:
        return nbytes
    tile = made.tile(sizes.heads * (shape.nope + shape.value))
    turned = _ROTATING if formats.keys.rotates else 1
    return nbytes + turned * 4 * piece.batch * tile * (shape.rank + shape.rope)
