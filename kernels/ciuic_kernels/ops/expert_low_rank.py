"""``ciuic::expert_low_rank``: what low-rank adapters add to the routed products of fused experts.

``W_e + scale * B_e A_e`` is never formed: a routed row costs R * (K + N) multiplications, and memory that grows with
the rows, not with the experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ciuic_kernels.ops._define import define, differentiable
from ciuic_kernels.ops._products import row_fan


def _segments(expert_ids: Tensor, experts: int) -> tuple[Tensor, list[tuple[int, slice]]]:
    """Rows sorted by expert, and ``(expert, where its rows are in that order)``; ids that are no expert come last."""
    ids = expert_ids.reshape(-1)
    ids = torch.where((ids >= 0) & (ids < experts), ids, experts)
    order, counts = ids.argsort(stable=True), torch.bincount(ids, minlength=experts + 1).tolist()
    segments, start = [], 0
    for expert, count in enumerate(counts[:experts]):
        if count:
            segments.append((expert, slice(start, start + count)))
        start += count
    return order, segments


def expert_low_rank(x: Tensor, expert_ids: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale * B_e (A_e x)`` for every routed row, computed in the dtype of ``a`` and ``b``.

    Args:
        x: ``[T, K]`` (each row serves its k experts) or ``[T * k, K]``, floating point.
        expert_ids: int64 ``[T, k]``; an id outside ``0 .. E - 1`` gives a row of zeros.
        a, b: ``[E, R, K]`` and ``[E, N, R]``, of one floating-point dtype, any strides.
        scale: multiplies the result.

    Returns:
        ``[T * k, N]`` of x's dtype; row ``t * k + i`` belongs to ``expert_ids[t, i]``.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit each other.
    """
    fan = _check(x, expert_ids, a, b)
    experts, pairs = a.shape[0], expert_ids.numel()
    if pairs <= experts:  # no more than a copy of the factors, and a GPU is not waited for
        return _gathered(x, expert_ids.reshape(-1), a, b, scale, fan)
    out = x.new_zeros(pairs, b.shape[1])
    order, segments = _segments(expert_ids, experts)
    for expert, where in segments:
        rows = order[where]
        inner = x[rows // fan].to(a.dtype) @ a[expert].t()
        out[rows] = (inner.mul_(scale) @ b[expert].t()).to(x.dtype)
    return out


def _gathered(x: Tensor, ids: Tensor, a: Tensor, b: Tensor, scale: float, fan: int) -> Tensor:
    experts = a.shape[0]
    is_expert = (ids >= 0) & (ids < experts)
    chosen = torch.where(is_expert, ids, 0)
    each = x.repeat_interleave(fan, dim=0) if fan > 1 else x
    inner = torch.bmm(a[chosen], each.to(a.dtype).unsqueeze(2)).mul_(scale)
    y = torch.bmm(b[chosen], inner).squeeze(2)
    return torch.where(is_expert.unsqueeze(1), y, 0).to(x.dtype)


def _check(x: Tensor, expert_ids: Tensor, a: Tensor, b: Tensor) -> int:
    """Expert rows for each row of x. Raises ValueError."""
    fan = row_fan("expert_low_rank", x, expert_ids)
    fits = a.dim() == b.dim() == 3 and (a.shape[0], a.shape[1]) == (b.shape[0], b.shape[2])
    if not fits or a.shape[2] != x.shape[1]:
        raise ValueError(
            f"expert_low_rank needs a [E, R, {x.shape[1]}] and b [E, N, R], got {list(a.shape)} and {list(b.shape)}."
        )
    if a.dtype != b.dtype or not a.is_floating_point() or not x.is_floating_point():
        raise ValueError(
            f"x, a and b must be floating-point and a and b of one dtype, got {x.dtype}, {a.dtype} and {b.dtype}."
        )
    if not x.device == a.device == b.device:
        raise ValueError(f"x is on {x.device}, a on {a.device} and b on {b.device}; move them to one device.")
    return fan


def _expert_low_rank_fake(x: Tensor, expert_ids: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return x.new_empty((expert_ids.numel(), b.shape[1]))


expert_low_rank_op = define(expert_low_rank, _expert_low_rank_fake)


def expert_low_rank_backward(
    grad: Tensor, x: Tensor, expert_ids: Tensor, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to x, a and b, from grad ``[T * k, N]``; contiguous, in the dtypes of x, a and b."""
    fan = expert_ids.numel() // max(1, x.shape[0])
    grad_x = torch.zeros(x.shape, dtype=torch.promote_types(a.dtype, torch.float32), device=x.device)
    grad_a, grad_b = a.new_zeros(a.shape), b.new_zeros(b.shape)
    order, segments = _segments(expert_ids, a.shape[0])
    for expert, where in segments:
        rows = order[where]
        source = rows // fan
        inputs, outer = x[source].to(a.dtype), grad[rows].to(a.dtype) * scale
        inner = outer @ b[expert]
        grad_b[expert] = outer.t() @ (inputs @ a[expert].t())
        grad_a[expert] = inner.t() @ inputs
        grad_x.index_add_(0, source, (inner @ a[expert]).to(grad_x.dtype))
    return grad_x.to(x.dtype), grad_a, grad_b


def _expert_low_rank_backward_fake(
    grad: Tensor, x: Tensor, expert_ids: Tensor, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), a.new_empty(a.shape), b.new_empty(b.shape)


expert_low_rank_backward_op = define(expert_low_rank_backward, _expert_low_rank_backward_fake)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.scale = scale  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, expert_ids, a, b = ctx.saved_tensors  # type: ignore[attr-defined]
    grad_x, grad_a, grad_b = expert_low_rank_backward_op(grad, x, expert_ids, a, b, ctx.scale)  # type: ignore[attr-defined]
    return grad_x, None, grad_a, grad_b, None


differentiable("expert_low_rank", _backward, _setup_context)
