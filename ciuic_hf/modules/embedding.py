"""``CiuicEmbedding``: ``nn.Embedding`` with a compressed table."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from ciuic_hf.modules.packed import PackedModule, adopt
from ciuic_kernels import ops


class CiuicEmbedding(PackedModule, nn.Embedding):
    """Rows of a table ``[V, H]``, decoded when they are looked up. No gradient reaches the table."""

    @classmethod
    def adopt(cls, embedding: nn.Embedding, dtype: torch.dtype | None = None) -> Self:
        """Turn an Embedding into a CiuicEmbedding in place, without a table; ``set_packed`` installs one."""
        adopt(embedding, cls, ["weight"], dtype)
        assert isinstance(embedding, cls)
        return embedding

    def dense_class(self) -> type[nn.Module]:
        return nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """ids ``[...]`` -> ``[..., H]`` in ``dense_dtype``."""
        rows, cols = self.num_embeddings, self.embedding_dim
        return ops.embedding(
            input, self.weight, self.weight_tags, *self.derived("weight"), rows, cols, self.dense_dtype
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.packed_repr()}"
