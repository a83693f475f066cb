"""``ciuic::attend_packed``: attention to the packed pages of a compressed key-value cache.

One part of a softmax: what is not packed is attended to elsewhere, and both are merged by their log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ciuic_kernels.attention import AttentionShape
from ciuic_kernels.cache_codes import channels_of, parts_of, tokens_of
from ciuic_kernels.dispatch import attention_choice
from ciuic_kernels.ops._define import define

LOWEST = torch.finfo(torch.float32).min
"""Log-sum-exp of a query that sees nothing: finite, so that no difference of two of them is NaN."""


def page_addresses(records: list[Tensor], parts: int) -> Tensor:
    """Where the parts of pages lie: int64 ``[pages, parts]``, on the CPU.

    Args:
        records: as ``attend_packed`` takes them.

    Raises:
        ValueError: for a part that is not contiguous or starts at no multiple of 16 bytes.
    """
    found = []
    for part in records:
        pages = part.shape[0] if len(records) == parts and part.dim() == 5 else 1
        step = part.stride(0) * part.element_size() if pages > 1 else 0
        if not part.is_contiguous() or part.data_ptr() % 16 or step % 16:
            raise ValueError(
                "A page's part must be contiguous and start at a multiple of 16 bytes; clone() it."
            )
        found.append([part.data_ptr() + page * step for page in range(pages)])
    if records and len(found[0]) > 1:
        return torch.tensor(found, dtype=torch.int64).t().contiguous()
    return torch.tensor([row[0] for row in found], dtype=torch.int64).view(-1, parts)


def attend_packed(
    query: Tensor,
    query_rope: Tensor | None,
    records: list[Tensor],
    addresses: Tensor,
    pages: Tensor,
    count: Tensor,
    mask: Tensor | None,
    scale: float,
    key_bits: int,
    key_group: int,
    value_bits: int,
    value_group: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Attend to the pages of one layer, laid out as in ``cache_codes``.

    Keys are by channel and values by token; with ``query_rope`` pages are latents, by token, which are keys and values
    at once, and their rotary part, by channel, whose scores are added. Nothing here waits for a GPU.

    Args:
        query: ``[B, heads, Q, D]``, floating point; heads is a multiple of those of the pages. Rotated already where
            the format of the keys rotates.
        query_rope: ``[B, heads, Q, R]`` of the same dtype, or None.
        records: the parts of page 0, keys' first, of page 1, and so on; or each part once with a leading dimension of
            pages. Kernels read ``addresses`` instead: passed so that what is there outlives the launch.
        addresses: int64 ``[pages, parts]``, where the parts lie on the device, multiples of 16 (``page_addresses``).
        pages: int32 ``[pages, 3]``: tokens that count, position of the first, tokens that there is room for.
        count: int32 ``[1]``: how many pages are in use.
        mask: bool ``[B or 1, Q or 1, positions]`` of any strides, False where a token is not seen, or None.
        scale: of the scores.
        key_bits, key_group, value_bits, value_group: the formats; of latents and of their rotary part.
        width: of a value, or of a latent.

    Returns:
        float32 ``[B, heads, Q, width]``, the weighted mean of values, rotated where their format rotates, and float32
        ``[B, heads, Q]``, the natural logarithm of the sum of weights. Where nothing is seen they are 0 and
        float32's lowest number.

    Raises:
        ValueError: for queries, pages or a mask that do not fit together.
    """
    latent = query_rope is not None
    parts = sum(parts_of(key_bits, value_bits, latent))
    _check(query, query_rope, records, parts, addresses, pages, mask)
    rope_width = query_rope.shape[-1] if query_rope is not None else width
    shape = packed_shape(query, records, pages, latent, rope_width, key_group, value_group)
    choice = attention_choice(shape, query.dtype, query.device)
    if choice.launch is not None:
        from ciuic_kernels.triton.attention import attend_packed as fused  # the first kernel imports Triton

        return fused(
            query=query.contiguous(), query_rope=None if query_rope is None else query_rope.contiguous(),
            addresses=addresses, pages=pages, count=count, mask=mask, scale=scale, formats=(
                key_bits, key_group, value_bits, value_group), width=width, shape=shape, launch=choice.launch,
        )  # fmt: skip
    return _reference(
        query, query_rope, records, parts, pages, count, mask, scale, key_bits, key_group, value_bits,
        value_group, width,
    )  # fmt: skip


def packed_shape(
    query: Tensor,
    records: list[Tensor],
    pages: Tensor,
    latent: bool,
    value_width: int,
    key_group: int,
    value_group: int,
) -> AttentionShape:
    """The sizes of a call; room for tokens is that of the largest page times the number of pages."""
    batch, heads, queries, key_width = query.shape
    cached = records[0].shape[-3] if records else heads
    room = max((part.shape[-2] for part in records), default=0) if latent else 0
    if not latent and records:
        room = max(part.shape[-1] for part in records if part.dtype != torch.uint8) * key_group
    return AttentionShape(
        batch,
        cached,
        heads // cached * queries,
        queries,
        key_width,
        value_width,
        key_group,
        value_group,
        pages.shape[0] * room,
        latent,
    )


def _check(
    query: Tensor,
    query_rope: Tensor | None,
    records: list[Tensor],
    parts: int,
    addresses: Tensor,
    pages: Tensor,
    mask: Tensor | None,
) -> None:
    """Raises ValueError."""
    if query.dim() != 4 or not query.is_floating_point():
        raise ValueError(
            f"query must be floating-point [B, heads, Q, D], got {query.dtype} {list(query.shape)}."
        )
    if query_rope is not None and query_rope.shape[:3] != query.shape[:3]:
        raise ValueError(
            f"query_rope {list(query_rope.shape)} must match query {list(query.shape)} but for its width."
        )
    number = pages.shape[0]
    if len(records) not in (parts, parts * number) or addresses.shape != (number, parts) or pages.dim() != 2:
        raise ValueError(
            f"{number} pages of {parts} parts need as many records and addresses [{number}, {parts}], "
            f"got {len(records)} and {list(addresses.shape)}."
        )
    batch, heads, queries, _ = query.shape
    if records and (records[0].shape[-4] != batch or heads % records[0].shape[-3]):
        raise ValueError(
            f"query has {batch} sequences of {heads} heads, the pages have {list(records[0].shape[-4:-2])}."
        )
    if mask is not None and (
        mask.dtype != torch.bool
        or mask.dim() != 3
        or mask.shape[0] not in (1, batch)
        or mask.shape[1] not in (1, queries)
    ):
        raise ValueError(
            f"mask must be bool [{batch} or 1, {queries} or 1, positions], got {mask.dtype} {list(mask.shape)}."
        )


def _page(records: list[Tensor], parts: int, page: int) -> list[Tensor]:
    if records[0].dim() == 5:
        return [part[page] for part in records]
    return records[page * parts : (page + 1) * parts]


def _reference(
    query: Tensor,
    query_rope: Tensor | None,
    records: list[Tensor],
    parts: int,
    pages: Tensor,
    count: Tensor,
    mask: Tensor | None,
    scale: float,
    key_bits: int,
    key_group: int,
    value_bits: int,
    value_group: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """All scores at once, in float32."""
    batch, heads, queries, key_width = query.shape
    scores, values = [], []
    of_keys = parts_of(key_bits, value_bits, query_rope is not None)[0]
    for page, (tokens, first, _) in enumerate(pages[: int(count)].tolist()):
        if not tokens:
            continue
        record = _page(records, parts, page)
        keys, others = tuple(record[:of_keys]), tuple(record[of_keys:])
        if query_rope is not None:
            k = tokens_of(keys, key_bits, key_group, key_width)[:, :, :tokens]
            rope = channels_of(others, value_bits, value_group)[:, :, :tokens]
            v = k
        else:
            k = channels_of(keys, key_bits, key_group)[:, :, :tokens]
            v = tokens_of(others, value_bits, value_group, width)[:, :, :tokens]
        grouped = query.float().view(batch, k.shape[1], -1, key_width)
        s = grouped @ k.mT
        if query_rope is not None:
            s = s + query_rope.float().view(batch, k.shape[1], -1, query_rope.shape[-1]) @ rope.mT
        s = s.view(batch, heads, queries, tokens) * scale
        if mask is not None:
            seen = mask[..., first : first + tokens]
            s = s.masked_fill(~seen[:, None], float("-inf"))
            v = v.masked_fill(~seen.any(1)[:, None, :, None], 0.0)
        scores.append(s)
        values.append(v)
    if not scores:
        return query.new_zeros(batch, heads, queries, width, dtype=torch.float32), query.new_full(
            (batch, heads, queries), LOWEST, dtype=torch.float32
        )
    s, v = torch.cat(scores, -1), torch.cat(values, 2)
    lse = s.logsumexp(-1).clamp(min=LOWEST)
    weights = (s - lse[..., None]).exp()
    out = weights.view(batch, v.shape[1], -1, s.shape[-1]) @ v
    return out.reshape(batch, heads, queries, width), lse


def _fake(
    query: Tensor,
    query_rope: Tensor | None,
    records: list[Tensor],
    addresses: Tensor,
    pages: Tensor,
    count: Tensor,
    mask: Tensor | None,
    scale: float,
    key_bits: int,
    key_group: int,
    value_bits: int,
    value_group: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    lead = query.shape[:3]
    return query.new_empty((*lead, width), dtype=torch.float32), query.new_empty(lead, dtype=torch.float32)


attend_packed_op = define(attend_packed, _fake)
