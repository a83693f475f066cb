"""``ciuic::linear``: ``x @ W.T + bias`` with a compressed W, decoded on the fly."""

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


def linear(
    x: Tensor, arena: Tensor, tags: Tensor, offsets: Tensor, bias: Tensor | None, rows: int, cols: int
) -> Tensor:
    """Multiply with a compressed matrix W ``[N, K]``.

    Args:
        x: ``[..., K]``, floating point.
        arena: uint8 ``[nbytes]``.
        tags: uint8 ``[strips, kblocks, 2]``.
        offsets: int64 ``[strips + 1]``, from ``layout.strip_offsets``.
        bias: ``[N]`` or None.
        rows, cols: N, K.

    Returns:
        ``[..., N]`` of x's dtype; products are accumulated in float32.

    Raises:
        ValueError: for an x of the wrong width, kind or device.
    """
    check_input(x, cols, arena)
    flat = x.reshape(-1, cols)
    if use_native(x.device) and 0 < flat.shape[0] <= NATIVE_ROWS:
        out = fused_product(flat, 1, native.groups_of_all(flat.shape[0]), arena, tags, offsets, rows)
    else:
        out = dense_product(flat, arena, tags, offsets, rows)
    if bias is not None:
        out = out + bias.to(out.dtype)
    return out.view(*x.shape[:-1], rows)


def _linear_fake(
    x: Tensor, arena: Tensor, tags: Tensor, offsets: Tensor, bias: Tensor | None, rows: int, cols: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


linear_op = define(linear, _linear_fake)


def linear_backward(grad: Tensor, arena: Tensor, tags: Tensor, offsets: Tensor, cols: int) -> Tensor:
    """Gradient with respect to x: ``grad [..., N] @ W`` as ``[..., K]``."""
    flat = grad.reshape(-1, grad.shape[-1])
    return dense_transposed_product(flat, arena, tags, offsets, cols).view(*grad.shape[:-1], cols)


def _linear_backward_fake(grad: Tensor, arena: Tensor, tags: Tensor, offsets: Tensor, cols: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], cols))


linear_backward_op = define(linear_backward, _linear_backward_fake)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    x, arena, tags, offsets, bias, _rows, _cols = inputs
    ctx.save_for_backward(arena, tags, offsets)
    ctx.cols = x.shape[-1]  # type: ignore[attr-defined]
    ctx.has_bias = bias is not None  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    arena, tags, offsets = ctx.saved_tensors  # type: ignore[attr-defined]
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
        grad_x = linear_backward_op(grad, arena, tags, offsets, ctx.cols)  # type: ignore[attr-defined]
    if ctx.has_bias and ctx.needs_input_grad[4]:  # type: ignore[attr-defined]
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, None, grad_bias, None, None


differentiable("linear", _backward, _setup_context)
