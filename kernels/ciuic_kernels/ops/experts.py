"""``ciuic::expert_linear``: every token with the compressed matrices of the experts it was routed to."""

from __future__ import annotations

import torch
from torch import Tensor

from ciuic_kernels.cpu import native
from ciuic_kernels.dispatch import product_choice, use_native, use_triton
from ciuic_kernels.format import ceil_div
from ciuic_kernels.ops._define import define, differentiable
from ciuic_kernels.ops._products import (
    NATIVE_ROWS,
    Matrix,
    check_input,
    dense_product,
    dense_transposed_product,
    fused_product,
    row_fan,
)
from ciuic_kernels.selection import EXPERTS


def _routed(expert_ids: Tensor, experts: int) -> list[tuple[int, list[int]]]:
    """``(expert, rows)`` for every expert that has rows; an id of ``experts`` or more means no expert."""
    rows: dict[int, list[int]] = {}
    for row, expert in enumerate(expert_ids.reshape(-1).tolist()):
        if expert < 0:
            raise IndexError(f"Expert ids must not be negative, got {expert}.")
        if expert < experts:
            rows.setdefault(expert, []).append(row)
    return sorted(rows.items())


def _groups(routed: list[tuple[int, list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of several experts as ``order, starts, experts`` for the fused kernel."""
    order: list[int] = []
    starts, experts = [0], []
    for expert, members in routed:
        for first in range(0, len(members), native.MAX_TOKENS):
            order += members[first : first + native.MAX_TOKENS]
            starts.append(len(order))
            experts.append(expert)
    return torch.tensor(order), torch.tensor(starts), torch.tensor(experts)


def expert_linear(
    x: Tensor,
    expert_ids: Tensor,
    arena: Tensor,
    tags: Tensor,
    offsets: Tensor,
    work: Tensor,
    kinds: list[int],
    rows: int,
    cols: int,
) -> Tensor:
    """Multiply rows with the matrices ``W[expert]`` of compressed fused experts ``[E, N, K]``.

    Only experts that are routed to are read.

    Args:
        x: ``[T, K]`` (each row serves its k experts) or ``[T * k, K]``.
        expert_ids: int64 ``[T, k]``; an id of E or more gives a row of zeros.
        arena: uint8 ``[nbytes]``.
        tags: uint8 ``[E, strips, kblocks, 2]``.
        offsets, work, kinds: from ``derived.derive``.
        rows, cols: N, K.

    Returns:
        ``[T * k, N]`` of x's dtype; row ``t * k + i`` belongs to ``expert_ids[t, i]``.

    Raises:
        ValueError: for an x of the wrong width, kind or device, or when x and expert_ids do not match.
        IndexError: for a negative id (on a GPU it would need a synchronisation; there it gives zeros as well).
    """
    check_input(x, cols, arena)
    experts, pairs = tags.shape[0], expert_ids.numel()
    fan = row_fan("expert_linear", x, expert_ids)
    if pairs and use_triton(x.device):
        choice = product_choice(EXPERTS, ceil_div(pairs, experts), rows * cols, x.dtype, x.device)
        if choice.launch is not None:
            from ciuic_kernels.triton.experts import expert_linear as fused_experts  # imports Triton

            return fused_experts(
                x=x.contiguous(), fan=fan, expert_ids=expert_ids.reshape(-1), arena=arena, tags=tags, work=work,
                kinds=kinds, rows=rows, launch=choice.launch,
            )  # fmt: skip
    few = NATIVE_ROWS if use_native(x.device) else 0
    matrix = Matrix(arena, tags, offsets, work, kinds, rows, cols)
    routed = _routed(expert_ids, experts)
    small = [(expert, members) for expert, members in routed if len(members) <= few]
    large = [(expert, members) for expert, members in routed if len(members) > few]
    groups = _groups(small)
    if not large and len(groups[0]) == pairs > 0:
        return fused_product(x, fan, groups, matrix)
    out = x.new_zeros(pairs, rows)
    if small:
        out[groups[0]] = fused_product(x, fan, groups, matrix)[groups[0]]
    for expert, members in large:
        here = torch.tensor(members, device=x.device)
        out[here] = dense_product(x[here // fan], matrix._replace(which=expert))
    return out


def _expert_linear_fake(
    x: Tensor,
    expert_ids: Tensor,
    arena: Tensor,
    tags: Tensor,
    offsets: Tensor,
    work: Tensor,
    kinds: list[int],
    rows: int,
    cols: int,
) -> Tensor:
    return x.new_empty((expert_ids.numel(), rows))


expert_linear_op = define(expert_linear, _expert_linear_fake)


def expert_linear_backward(
    grad: Tensor,
    expert_ids: Tensor,
    arena: Tensor,
    tags: Tensor,
    offsets: Tensor,
    work: Tensor,
    kinds: list[int],
    cols: int,
    x_rows: int,
) -> Tensor:
    """Gradient with respect to x: ``[x_rows, cols]`` from grad ``[T * k, N]``."""
    fan = expert_ids.numel() // max(1, x_rows)
    total = torch.zeros(x_rows, cols, dtype=torch.float32, device=grad.device)
    matrix = Matrix(arena, tags, offsets, work, kinds, grad.shape[1], cols)
    for expert, members in _routed(expert_ids, tags.shape[0]):
        here = torch.tensor(members, device=grad.device)
        part = dense_transposed_product(grad[here], matrix._replace(which=expert))
        total.index_add_(0, here // fan, part.float())
    return total.to(grad.dtype)


def _expert_linear_backward_fake(
    grad: Tensor,
    expert_ids: Tensor,
    arena: Tensor,
    tags: Tensor,
    offsets: Tensor,
    work: Tensor,
    kinds: list[int],
    cols: int,
    x_rows: int,
) -> Tensor:
    return grad.new_empty((x_rows, cols))


expert_linear_backward_op = define(expert_linear_backward, _expert_linear_backward_fake)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    x, expert_ids, arena, tags, offsets, work, kinds, _rows, _cols = inputs
    ctx.save_for_backward(expert_ids, arena, tags, offsets, work)
    ctx.kinds, ctx.x_shape = kinds, x.shape  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x_rows, cols = ctx.x_shape  # type: ignore[attr-defined]
    saved, kinds = ctx.saved_tensors, ctx.kinds  # type: ignore[attr-defined]
    return (expert_linear_backward_op(grad, *saved, kinds, cols, x_rows), *[None] * 8)


differentiable("expert_linear", _backward, _setup_context)
