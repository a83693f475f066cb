"""``ciuic::linears``: several products with the same x, where it pays in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ciuic_kernels.dispatch import product_choice, use_triton
from ciuic_kernels.ops._define import define, differentiable
from ciuic_kernels.ops._products import check_input, reshaped
from ciuic_kernels.ops.linear import linear, linear_backward_op
from ciuic_kernels.selection import LINEAR, Launch, shares_launch


def linears(
    x: Tensor,
    arenas: list[Tensor],
    tags: list[Tensor],
    offsets: list[Tensor],
    works: list[Tensor],
    kinds: list[int],
    kind_counts: list[int],
    biases: list[Tensor],
    biased: list[bool],
    rows: list[int],
    cols: int,
) -> list[Tensor]:
    """Multiply one x with several compressed matrices ``[N, K]`` of one K.

    Every list but kinds and biases has one entry for each matrix, as ``linear`` takes it.

    Args:
        x: ``[..., K]``, floating point.
        kinds: those of all matrices, one after another.
        kind_counts: how many of them each matrix has.
        biases: ``[N]`` of the matrices that have one.
        biased: which have one.
        cols: K.

    Returns:
        ``[..., N]`` of x's dtype for each, contiguous and in memory of their own.

    Raises:
        ValueError: for an x of the wrong width, kind or device, or lists of different lengths.
    """
    if len({len(each) for each in (arenas, tags, offsets, works, kind_counts, biased, rows)}) > 1:
        raise ValueError("linears needs one entry for each matrix in every list but kinds and biases.")
    if len(biases) != sum(biased):
        raise ValueError(f"linears got {len(biases)} biases for the {sum(biased)} matrices that have one.")
    for arena in arenas:
        check_input(x, cols, arena)
    own, given = _split(kinds, kind_counts), iter(biases)
    bias_of = [next(given) if has_bias else None for has_bias in biased]
    flat = x.reshape(-1, cols)
    launch = _shared_launch(flat, own, biases, rows)
    if launch is None:
        each = zip(arenas, tags, offsets, works, own, bias_of, rows, strict=True)
        return [linear(x, a, t, o, w, k, bias, n, cols) for a, t, o, w, k, bias, n in each]
    from ciuic_kernels.triton.linears import linears as one_launch  # the first kernel imports Triton

    outs = one_launch(
        x=flat.contiguous(), arenas=arenas, tags=tags, works=works, kinds=sorted(set(kinds)), biases=bias_of,
        rows=rows, launch=launch,
    )  # fmt: skip
    return [reshaped(y, x.shape[:-1]) for y in outs]


def _split(kinds: list[int], counts: list[int]) -> list[list[int]]:
    ends = [sum(counts[: place + 1]) for place in range(len(counts))]
    return [kinds[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _shared_launch(
    flat: Tensor, kinds: list[list[int]], biases: list[Tensor], rows: list[int]
) -> Launch | None:
    """How to launch all products at once; None where each has its own."""
    tokens, cols = flat.shape
    if not tokens or not use_triton(flat.device):
        return None
    launch = product_choice(LINEAR, tokens, sum(rows) * cols, flat.dtype, flat.device).launch
    one_dtype = len({bias.dtype for bias in biases}) < 2
    return launch if launch is not None and one_dtype and shares_launch(launch, kinds) else None


def _linears_fake(
    x: Tensor,
    arenas: list[Tensor],
    tags: list[Tensor],
    offsets: list[Tensor],
    works: list[Tensor],
    kinds: list[int],
    kind_counts: list[int],
    biases: list[Tensor],
    biased: list[bool],
    rows: list[int],
    cols: int,
) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], n)) for n in rows]


linears_op = define(linears, _linears_fake)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: list[Tensor]) -> None:
    _x, arenas, tags, offsets, works, kinds, counts, _biases, biased, _rows, cols = inputs
    ctx.save_for_backward(*arenas, *tags, *offsets, *works)
    ctx.kinds, ctx.cols = _split(kinds, counts), cols  # type: ignore[attr-defined]
    ctx.biased = biased  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grads: list[Tensor | None]) -> tuple[object, ...]:
    saved, count = ctx.saved_tensors, len(grads)  # type: ignore[attr-defined]
    stored = [saved[place::count] for place in range(count)]
    grad_x = None
    if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
        for grad, tensors, kinds in zip(grads, stored, ctx.kinds, strict=True):  # type: ignore[attr-defined]
            if grad is not None:
                part = linear_backward_op(grad, *tensors, kinds, ctx.cols)  # type: ignore[attr-defined]
                grad_x = part if grad_x is None else grad_x + part
    grad_biases = [
        None if grad is None else grad.reshape(-1, grad.shape[-1]).sum(0)
        for grad, has_bias in zip(grads, ctx.biased, strict=True)  # type: ignore[attr-defined]
        if has_bias
    ]
    none = [None] * count
    has_kinds = any(ctx.kinds)  # type: ignore[attr-defined]
    no_kinds: list[Tensor] | None = None if has_kinds else []  # torch takes [] for a list of tensors
    return grad_x, none, none, none, none, no_kinds, None, grad_biases, None, None, None


differentiable("linears", _backward, _setup_context)
