"""Token tables that are compressed keep their number of rows, and say so.

``PreTrainedModel.resize_token_embeddings`` takes the size of a table from its weight, which is an arena here, and has
no hook, so it is wrapped.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from ciuic_hf.errors import CiuicError
from ciuic_hf.modules.packed import PackedModule
from ciuic_kernels.format import ceil_div


def install() -> None:
    """Wrap it once; models whose tables are not compressed take the original path.

    Called when the first quantizer is made: importing ``PreTrainedModel`` earlier would make ``import ciuic_hf`` slow.
    """
    from transformers import PreTrainedModel

    original = PreTrainedModel.resize_token_embeddings
    if getattr(original, "wrapped_by_ciuic", False):
        return

    @wraps(original)
    def resize_token_embeddings(
        self: Any,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        table = self.get_input_embeddings()
        if not any(isinstance(module, PackedModule) for module in (table, self.get_output_embeddings())):
            return original(self, new_num_tokens, pad_to_multiple_of, *args, **kwargs)
        rows: int = table.num_embeddings
        wanted = rows if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            wanted = ceil_div(wanted, pad_to_multiple_of) * pad_to_multiple_of
        if wanted != rows:
            raise CiuicError(
                f"The token tables are compressed and keep their {rows} rows, {wanted} were asked for; load with "
                'CiuicConfig(modules={"embeddings": "raw", "lm_head": "raw"}) to resize them, or resize the original.'
            )
        return table

    resize_token_embeddings.wrapped_by_ciuic = True  # type: ignore[attr-defined]
    PreTrainedModel.resize_token_embeddings = resize_token_embeddings
