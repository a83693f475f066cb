"""``ciuic::expert_linear``: every token with the compressed matrices of the experts it was routed to."""

from __future__ import annotations

import torch
from torch import Tensor

from ciuic_kernels.cpu import native
from ciuic_kernels.dispatch import use_native
from ciuic_kernels.ops._define import define, differentiable
from ciuic_kernels.ops._products import (
    NATIVE_ROWS,
    check_input,
    dense_product,
    dense_transposed_product,
    fused_product,
)


def _routed(expert_ids: Tensor, experts: int) -> list[tuple[int, Tensor]]:
    """``(expert, rows int64 [n])`` for every expert that has rows; an id of ``experts`` or more means no expert."""
    flat = expert_ids.reshape(-1).cpu()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts).tolist()
    routed, start = [], 0
    for expert, count in enumerate(counts[:experts]):
        if count:
            routed.append((expert, order[start : start + count]))
        start += count
    return routed


def _groups(routed: list[tuple[int, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of several experts as ``order, starts, experts`` for the fused kernel."""
    starts, experts, base = [0], [], 0
    for expert, members in routed:
        for first in range(0, members.numel(), native.MAX_TOKENS):
            starts.append(base + min(first + native.MAX_TOKENS, members.numel()))
            experts.append(expert)
        base += members.numel()
    return torch.cat([members for _, members in routed]), torch.tensor(starts), torch.tensor(experts)


def expert_linear(
    x: Tensor, expert_ids: Tensor, arena: Tensor, tags: Tensor, offsets: Tensor, rows: int
) -> Tensor:
    """Multiply rows with the matrices ``W[expert]`` of compressed fused experts ``[E, N, K]``.

    Only experts that are routed to are read.

    Args:
        x: ``[T, K]`` (each row serves its k experts) or ``[T * k, K]``.
        expert_ids: int64 ``[T, k]``; an id of E or more gives a row of zeros.
        arena: uint8 ``[nbytes]``.
        tags: uint8 ``[E, strips, kblocks, 2]``.
        offsets: int64 ``[E * strips + 1]``, from ``layout.strip_offsets``.
        rows: N.

    Returns:
        ``[T * k, N]`` of x's dtype; row ``t * k + i`` belongs to ``expert_ids[t, i]``.

    Raises:
        ValueError: when the shapes of x and expert_ids do not match.
    """
    check_input(x, x.shape[-1], arena)
    experts, strips = tags.shape[0], tags.shape[1]
    fan = _fan(x, expert_ids)
    count = expert_ids.numel()
    out = x.new_zeros(count, rows)
    small: list[tuple[int, Tensor]] = []
    large: list[tuple[int, Tensor]] = []
    for expert, members in _routed(expert_ids, experts):
        few = use_native(x.device) and members.numel() <= NATIVE_ROWS
        (small if few else large).append((expert, members))
    if small:
        groups = _groups(small)
        part = fused_product(x, fan, groups, arena, tags, offsets, rows)
        if not large and len(groups[0]) == count:
            return part
        out[groups[0]] = part[groups[0]]
    for expert, members in large:
        here = members.to(x.device)
        out[here] = dense_product(x[here // fan], arena, tags[expert], offsets[expert * strips :], rows)
    return out


def _fan(x: Tensor, expert_ids: Tensor) -> int:
    """Expert rows for each row of x."""
    if x.dim() != 2 or expert_ids.dim() != 2 or x.shape[0] not in (expert_ids.shape[0], expert_ids.numel()):
        raise ValueError(
            f"expert_linear needs x [T, K] or [T * k, K] and expert_ids [T, k], "
            f"got {list(x.shape)} and {list(expert_ids.shape)}."
        )
    return expert_ids.shape[1] if x.shape[0] == expert_ids.shape[0] else 1


def _expert_linear_fake(
    x: Tensor, expert_ids: Tensor, arena: Tensor, tags: Tensor, offsets: Tensor, rows: int
) -> Tensor:
    return x.new_empty((expert_ids.numel(), rows))


expert_linear_op = define(expert_linear, _expert_linear_fake)


def expert_linear_backward(
    grad: Tensor, expert_ids: Tensor, arena: Tensor, tags: Tensor, offsets: Tensor, cols: int, x_rows: int
) -> Tensor:
    """Gradient with respect to x: ``[x_rows, cols]`` from grad ``[T * k, N]``."""
    fan = expert_ids.numel() // max(1, x_rows)
    total = torch.zeros(x_rows, cols, dtype=torch.float32, device=grad.device)
    for expert, members in _routed(expert_ids, tags.shape[0]):
        here = members.to(grad.device)
        part = dense_transposed_product(
            grad[here], arena, tags[expert], offsets[expert * tags.shape[1] :], cols
        )
        total.index_add_(0, here // fan, part.float())
    return total.to(grad.dtype)


def _expert_linear_backward_fake(
    grad: Tensor, expert_ids: Tensor, arena: Tensor, tags: Tensor, offsets: Tensor, cols: int, x_rows: int
) -> Tensor:
    return grad.new_empty((x_rows, cols))


expert_linear_backward_op = define(expert_linear_backward, _expert_linear_backward_fake)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    x, expert_ids, arena, tags, offsets, _rows = inputs
    ctx.save_for_backward(expert_ids, arena, tags, offsets)
    ctx.x_shape = x.shape  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    expert_ids, arena, tags, offsets = ctx.saved_tensors  # type: ignore[attr-defined]
    x_rows, cols = ctx.x_shape  # type: ignore[attr-defined]
    grad_x = expert_linear_backward_op(grad, expert_ids, arena, tags, offsets, cols, x_rows)
    return grad_x, None, None, None, None, None


differentiable("expert_linear", _backward, _setup_context)
