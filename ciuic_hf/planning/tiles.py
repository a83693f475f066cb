"""How attention with latents is computed on a compressed cache, tile by tile, and what that takes.

The sizes that :mod:`ciuic_hf.runtime.cache` goes by. Grouped heads are in :mod:`ciuic_hf.planning.attending`: a prompt
that goes in at once attends to its own keys and values as without a cache, one in pieces to tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE = 1 << 21
"""Elements of an expanded tile, and of the scores of one, about; a tile that is only decoded has half as many."""
BAND_WEIGHTS = 1 << 19
"""Weights of ``kv_b_proj`` that are decoded at a time when it is absorbed."""


def tile_tokens(tokens: int, group: int) -> int:
    """Whole groups of a tile of about ``tokens``, or whole eights where one group is more."""
    return tokens // group * group or max(8, tokens // 8 * 8)


@dataclass(frozen=True)
class LatentShape:
    """Sizes of one head."""

    rank: int
    nope: int
    rope: int
    value: int

    def absorbs(self, queries: int) -> bool:
        """Whether absorbing takes fewer products than expanding."""
        saved = (2 * self.rank + self.rope) - (self.nope + self.rope + self.value)
        return saved * queries <= self.rank * (self.nope + self.value)

    def most_absorbed(self, queries: int) -> int:
        """As many of these queries as can be absorbed."""
        saved = 2 * self.rank - self.nope - self.value
        return queries if saved <= 0 else min(queries, self.rank * (self.nope + self.value) // saved)


@dataclass(frozen=True)
class TiledPass:
    """Attention of ``queries`` new tokens in each of ``batch`` sequences to ``context``, themselves among them.

    Attributes:
        element_nbytes: of the model's dtype.
        compute_nbytes: of the dtype of the products.
        band_weights: of ``kv_b_proj`` that a product decodes at a time.
        rotates: whether latents are stored rotated.
        group: tokens that are packed together.
    """

    shape: LatentShape
    heads: int
    batch: int
    queries: int
    context: int
    element_nbytes: int
    compute_nbytes: int
    band_weights: int
    rotates: bool
    group: int

    def tile(self, width: int) -> int:
        """Tokens of a tile whose tokens have ``width`` elements in a sequence."""
        return min(self.context, tile_tokens(TILE // (self.batch * width), self.group))

    def _scores_nbytes(self, tokens: int) -> tuple[int, int]:
        """Of a tile of ``tokens``: while scores are formed, and what stays until the next are.

        Two kinds of scores are added, while scores and weights of the turn before are alive; where products are
        narrower, both those and float32 ones hidden by the mask.
        """
        of_query = self.batch * self.heads * tokens
        scores, narrow = of_query * min(self.queries, max(1, TILE // of_query)), self.compute_nbytes < 4
        return scores * max(8 + 2 * self.compute_nbytes, 12 + narrow * self.compute_nbytes), 8 * scores

    def expanded_nbytes(self, weights: int) -> int:
        """Beside the queries in the model's dtype, when tiles are expanded by ``kv_b_proj`` of ``weights``."""
        shape, compute, tokens = self.shape, self.compute_nbytes, self.batch * self.queries
        queries = compute * tokens * self.heads * (shape.nope + shape.rope)
        results = tokens * self.heads * shape.value
        width = self.heads * (shape.nope + shape.value)
        tile = self.tile(width)
        states = self.batch * tile * width
        scoring, kept = self._scores_nbytes(tile)
        converted = compute if compute != self.element_nbytes else 0
        expanding = kept + states * (self.element_nbytes + converted)
        expanding += self.element_nbytes * min(self.band_weights, weights)
        return queries + max(
            queries if converted else 0,
            4 * results + max(compute * states + scoring, expanding),
            (4 + self.element_nbytes) * results,
        )

    def absorbed_nbytes(self) -> int:
        """The same where ``kv_b_proj`` is absorbed into queries: float32 sums as wide as latents, turned back."""
        shape, compute, tokens = self.shape, self.compute_nbytes, self.batch * self.queries
        latents = tokens * self.heads * shape.rank
        queries = compute * tokens * self.heads * (shape.nope + shape.rope)
        tile = self.tile(2 * (shape.rank + shape.rope))
        decoded = compute * self.batch * tile * (shape.rank + shape.rope)
        turning = (compute + 4 * 4) * latents if self.rotates else 0
        working = (compute + 4) * latents + decoded + self._scores_nbytes(tile)[0]
        return queries + max(turning, working, (2 * compute + 4) * latents + compute * BAND_WEIGHTS)
