"""What the gate compares: every operator on one parameter or cache, in one dtype, with what it is in float64.

Each check gives pairs ``(where within the case, what is wrong)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ciuic_hf.bench.kernels.operands import Operand, activations, operand_of, together
from ciuic_hf.bench.kernels.pages import Sizes, exact_attention, pages_of
from ciuic_kernels import BlockGrid, codec_by_name, ops
from ciuic_kernels.packing import decode_tensor, encode_tensor
from ciuic_kernels.tolerances import UNIT_ROUNDOFF, exact_product, product_bound

Found = list[tuple[str, str]]
SCALE = 0.1
LOWEST = torch.finfo(torch.float32).min
NORM_ROUNDINGS = 16
"""Roundings that the norm of attention's error may come to. The bound adds up all that can happen to one element, which
in bfloat16 is more than the element; but roundings are independent, and in the norm come to about two."""


def encoded(
    shape: tuple[int, ...], codecs: Sequence[str], device: torch.device, seed: int = 0
) -> tuple[Operand, Tensor]:
    """A parameter of Gaussian weights, and what the reference decodes it to on the CPU, float32.

    Args:
        codecs: names; every block has a random one of them.
    """
    generator = torch.Generator().manual_seed(seed)
    source = (0.02 * torch.randn(shape, generator=generator)).half()  # the only dtype that all codecs take
    known = torch.tensor([codec_by_name(name).id for name in codecs], dtype=torch.uint8)
    ids = known[torch.randint(len(known), BlockGrid(shape).tags_shape[:-1], generator=generator)]
    packed = encode_tensor(source, ids)
    dense = decode_tensor(packed).to(device)
    packed.arena, packed.tags = packed.arena.to(device), packed.tags.to(device)
    return operand_of(packed), dense


def check_linear(
    operand: Operand, dense: Tensor, dtype: torch.dtype, tokens: Sequence[int], biased: bool
) -> Found:
    found = []
    noise = torch.Generator().manual_seed(3)
    bias = torch.randn(operand.rows, generator=noise).to(dense.device, dtype) if biased else None
    for count in tokens:
        x = activations(count, operand.cols, dtype, dense.device)
        run = partial(ops.linear, x, *operand.stored, bias, operand.rows, operand.cols)
        what = wrong_product(run, exact_product(x, dense, bias), product_bound(x, dense, bias), dtype)
        found += [(f", {count} tokens{', bias' if biased else ''}", text) for text in what]
    return found


def check_experts(
    operand: Operand, dense: Tensor, dtype: torch.dtype, pairs: Sequence[tuple[int, int]]
) -> Found:
    found, experts = [], dense.shape[0]
    for tokens, fan in pairs:
        for x_rows in (tokens, tokens * fan):  # a row for each token, or for each of its experts
            x = activations(x_rows, operand.cols, dtype, dense.device)
            drawn = torch.randint(-1, experts + 2, (tokens, fan), generator=torch.Generator().manual_seed(5))
            ids = drawn.to(dense.device)
            flat, rows = ids.flatten(), x if x_rows == tokens * fan else x.repeat_interleave(fan, dim=0)
            exact = torch.zeros(flat.numel(), operand.rows, dtype=torch.float64, device=dense.device)
            bound = torch.zeros_like(exact)
            for expert in range(experts):
                here = flat == expert
                exact[here] = exact_product(rows[here], dense[expert])
                bound[here] = product_bound(rows[here], dense[expert])
            run = partial(ops.expert_linear, x, ids, *operand.stored, operand.rows, operand.cols)
            what = wrong_product(run, exact, bound, dtype)
            found += [(f", {tokens} tokens x {fan}, {x_rows} rows of x", text) for text in what]
    return found


def check_dequantize(operand: Operand, dense: Tensor, dtype: torch.dtype) -> Found:
    decoded = ops.dequantize(*operand.stored, operand.rows, operand.cols, dtype)
    return [("", "values differ from the reference")] if not torch.equal(decoded, dense.to(dtype)) else []


def check_embedding(operand: Operand, dense: Tensor, dtype: torch.dtype, count: int) -> Found:
    rows = operand.rows
    drawn = torch.randint(rows, (2, count // 2), generator=torch.Generator().manual_seed(7))
    ids = drawn.to(dense.device)
    run = partial(ops.embedding, rows=rows, cols=operand.cols, dtype=dtype)
    found = []
    if not torch.equal(run(ids, *operand.stored), dense.to(dtype)[ids]):
        found.append(("", "rows differ from the reference"))
    outside = torch.tensor([-1, 0, rows, 1 << 40], device=dense.device)
    inside = torch.tensor([False, True, False, False], device=dense.device)
    if dense.device.type == "cuda":
        finite = run(outside, *operand.stored).isnan().all(dim=1) ^ inside
        if not bool(finite.all()):
            found.append((", ids out of range", "does not give rows of NaN there and only there"))
    return found


def wrong_product(run: Callable[[], Tensor], exact: Tensor, bound: Tensor, dtype: torch.dtype) -> list[str]:
    """``wrong_results`` of running a product twice."""
    return wrong_results([run(), run()], exact, bound, dtype)


def wrong_results(results: Sequence[Tensor], exact: Tensor, bound: Tensor, dtype: torch.dtype) -> list[str]:
    """What is wrong with two results of one thing: dtype, size, holes, error, differences between them."""
    first, second = results
    if first.dtype != dtype or first.shape != exact.shape:
        return [f"gives {first.dtype} {list(first.shape)}"]
    wrong = []
    excess = (first.double() - exact).abs() - bound
    if bool(excess.isnan().any()):
        wrong.append(f"{int(excess.isnan().sum())} of {excess.numel()} elements are NaN or were not written")
    elif bool((excess > 0).any()):
        wrong.append(f"off by {float(excess.max()):.3g} more than the bound allows")
    if not torch.equal(first, second) and not wrong:
        wrong.append("two runs differ")
    return wrong


def check_linears(
    operands: Sequence[tuple[Operand, Tensor]], dtype: torch.dtype, tokens: Sequence[int]
) -> Found:
    """Matrices of one width multiplied together, every second one with a bias."""
    found = []
    cols, device = operands[0][0].cols, operands[0][1].device
    noise = torch.Generator().manual_seed(4)
    biases = [
        torch.randn(operand.rows, generator=noise).to(device, dtype) if place % 2 else None
        for place, (operand, _) in enumerate(operands)
    ]
    given = [bias for bias in biases if bias is not None]
    stored, rows = together([operand for operand, _ in operands]), [operand.rows for operand, _ in operands]
    for count in tokens:
        x = activations(count, cols, dtype, device)
        arguments = (x, *stored, given, [bias is not None for bias in biases], rows, cols)
        runs = [ops.linears(*arguments) for _ in range(2)]
        for place, (_, dense) in enumerate(operands):
            bias = biases[place]
            exact, bound = exact_product(x, dense, bias), product_bound(x, dense, bias)
            what = wrong_results([run[place] for run in runs], exact, bound, dtype)
            found += [(f", {count} tokens, matrix {place}", text) for text in what]
    return found


def check_attention(
    latent: bool,
    bits: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    sizes: Sizes,
    queries: Sequence[tuple[int, int]],
    masked: bool,
) -> Found:
    """Few new tokens attend to packed pages; with masks as well, of padding and of everything.

    Args:
        shape: heads of the cache, width of a key, width of a value (latents: rank, rotary width).
        sizes: of the pages.
        queries: pairs of heads of the model for each of the cache, and new tokens.
    """
    heads, key_width, value_width = shape
    noise = torch.Generator().manual_seed(6)
    pages = pages_of(bits, latent, sizes, heads, (key_width, value_width), 2, device, noise)
    total, width = pages.keys.shape[2], key_width if latent else value_width
    padding = torch.ones(2, 1, total + 7, dtype=torch.bool, device=device)
    padding[0, :, : sizes[0][0] + 8] = False  # the first page and some of the next
    hidden = torch.zeros_like(padding)
    found = []
    for group, new in queries:
        query = torch.randn(2, heads * group, new, key_width, generator=noise).to(device, dtype)
        rope = torch.randn(2, heads * group, new, value_width, generator=noise).to(device, dtype)
        for mask in (None, padding, hidden) if masked else (None,):
            given = (query, rope if latent else None, *pages.arguments, mask, SCALE, *pages.codes, width)
            exact = exact_attention(query, rope if latent else None, pages, mask, SCALE)
            runs = [ops.attend_packed(*given) for _ in range(2)]
            at = f", {group} x {new} queries{'' if mask is None else ', masked'}"
            for part, exact_part, bound, name in (
                (0, exact.out, exact.out_bound, "mean"),
                (1, exact.lse, exact.lse_bound, "log-sum-exp"),
            ):
                unseen = exact.lse == LOWEST
                # Where nothing is seen the results are constants; their difference is exact then.
                result = [run[part].masked_fill(unseen, 0) if part else run[part] for run in runs]
                wanted = exact_part.masked_fill(unseen, 0) if part else exact_part
                what = wrong_results(result, wanted, bound, torch.float32)
                found += [(f"{at}, {name}", text) for text in what]
            off = float((runs[0][0].double() - exact.out).norm() / exact.out.norm().clamp_min(1e-9))
            if not off <= NORM_ROUNDINGS * UNIT_ROUNDOFF[dtype]:
                found.append((at, f"means are off by {off:.2%} of their norm"))
            if not bool((runs[0][1][exact.lse == LOWEST] == LOWEST).all()):
                found.append((at, "a query that sees nothing has no log-sum-exp of float32's lowest number"))
    return found


def check_inputs(operand: Operand, dense: Tensor, dtype: torch.dtype) -> Found:
    """Inputs that are unusual are multiplied right; those that cannot be are refused with one sentence."""
    rows, cols, device = operand.rows, operand.cols, dense.device

    def product(x: Tensor) -> Tensor:
        out: Tensor = ops.linear(x, *operand.stored, None, rows, cols)
        return out

    found = []
    for name, x in _unusual(cols, dtype, device):
        flat = x.reshape(-1, cols)
        exact, bound = exact_product(flat, dense), product_bound(flat, dense)
        if list(product(x).shape) != [*x.shape[:-1], rows]:
            found.append((f", {name}", f"gives {list(product(x).shape)}"))
            continue
        results = [product(x).reshape(-1, rows) for _ in range(2)]
        what = wrong_results(results, exact, bound, x.dtype)
        found += [(f", {name}", text) for text in what]
    refused = [
        ("one column too few", activations(2, cols - 1, dtype, device)),
        ("integers", torch.zeros(2, cols, dtype=torch.int64, device=device)),
    ]
    if device.type == "cuda":
        refused.append(("another device", activations(2, cols, dtype, torch.device("cpu"))))
    for name, x in refused:
        try:
            product(x)
        except ValueError as error:
            if "\n" in str(error) or not str(error).endswith("."):
                found.append((f", {name}", f"is not refused with one sentence: {error}"))
        else:
            found.append((f", {name}", "is not refused"))
    return found


def _unusual(cols: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    yield "no tokens", activations(0, cols, dtype, device)
    yield "a transposed x", activations(cols, 5, dtype, device).t()
    yield "every second column", activations(5, 2 * cols, dtype, device)[:, ::2]
    yield (
        "an x that begins at an odd element",
        activations(1, 5 * cols + 1, dtype, device)[0, 1:].view(5, cols),
    )
    yield "one token for all", activations(1, cols, dtype, device).expand(5, cols)
    yield "three dimensions", activations(6, cols, dtype, device).view(2, 3, cols)
    yield "float32", activations(5, cols, torch.float32, device)
