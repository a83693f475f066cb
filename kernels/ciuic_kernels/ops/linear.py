"""``ciuic::linear``: ``x @ W.T + bias`` with a compressed W, decoded on the fly."""

from __future__ import annotations

import torch
from torch import Tensor

from ciuic_kernels.cpu import native
from ciuic_kernels.dispatch import product_choice, use_native, use_triton
from ciuic_kernels.ops._define import define, differentiable
from ciuic_kernels.ops._products import (
    NATIVE_ROWS,
    Matrix,
    check_input,
    dense_product,
    dense_transposed_product,
    fused_product,
    reshaped,
)
from ciuic_kernels.selection import LINEAR


def linear(
    x: Tensor,
    arena: Tensor,
    tags: Tensor,
    offsets: Tensor,
    work: Tensor,
    kinds: list[int],
    bias: Tensor | None,
    rows: int,
    cols: int,
) -> Tensor:
    """Multiply with a compressed matrix W ``[N, K]``.

    Args:
        x: ``[..., K]``, floating point.
        arena: uint8 ``[nbytes]``.
        tags: uint8 ``[strips, kblocks, 2]``.
        offsets, work, kinds: from ``derived.derive``.
        bias: ``[N]`` or None.
        rows, cols: N, K.

    Returns:
        ``[..., N]`` of x's dtype; products are accumulated in float32.

    Raises:
        ValueError: for an x of the wrong width, kind or device.
    """
    check_input(x, cols, arena)
    flat = x.reshape(-1, cols)
    matrix = Matrix(arena, tags, offsets, work, kinds, rows, cols)
    tokens = flat.shape[0]
    if tokens and use_triton(x.device):
        choice = product_choice(LINEAR, tokens, rows * cols, x.dtype, x.device)
        if choice.launch is not None:
            from ciuic_kernels.triton.linear import linear as fused_linear  # the first kernel imports Triton

            y = fused_linear(
                x=flat.contiguous(), arena=arena, tags=tags, work=work, kinds=kinds, bias=bias, rows=rows,
                launch=choice.launch,
            )  # fmt: skip
            return reshaped(y, x.shape[:-1])
    if use_native(x.device) and 0 < tokens <= NATIVE_ROWS:
        out = fused_product(flat, 1, native.groups_of_all(tokens), matrix)
    else:
        out = dense_product(flat, matrix)
    if bias is not None:
        out = out + bias.to(out.dtype)
    return reshaped(out, x.shape[:-1])


def _linear_fake(
    x: Tensor,
    arena: Tensor,
    tags: Tensor,
    offsets: Tensor,
    work: Tensor,
    kinds: list[int],
    bias: Tensor | None,
    rows: int,
    cols: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


linear_op = define(linear, _linear_fake)


def linear_backward(
    grad: Tensor, arena: Tensor, tags: Tensor, offsets: Tensor, work: Tensor, kinds: list[int], cols: int
) -> Tensor:
    """Gradient with respect to x: ``grad [..., N] @ W`` as ``[..., K]``."""
    flat = grad.reshape(-1, grad.shape[-1])
    matrix = Matrix(arena, tags, offsets, work, kinds, flat.shape[1], cols)
    return reshaped(dense_transposed_product(flat, matrix), grad.shape[:-1])


def _linear_backward_fake(
    grad: Tensor, arena: Tensor, tags: Tensor, offsets: Tensor, work: Tensor, kinds: list[int], cols: int
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], cols))


linear_backward_op = define(linear_backward, _linear_backward_fake)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    x, arena, tags, offsets, work, kinds, bias, _rows, _cols = inputs
    ctx.save_for_backward(arena, tags, offsets, work)
    ctx.kinds, ctx.cols = kinds, x.shape[-1]  # type: ignore[attr-defined]
    ctx.has_bias = bias is not None  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
        grad_x = linear_backward_op(grad, *ctx.saved_tensors, ctx.kinds, ctx.cols)  # type: ignore[attr-defined]
    if ctx.has_bias and ctx.needs_input_grad[6]:  # type: ignore[attr-defined]
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, None, None, None, grad_bias, None, None


differentiable("linear", _backward, _setup_context)
