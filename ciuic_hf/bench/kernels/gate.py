"""The gate: every GPU kernel against float64, with the bound that the tests use. Red means that no speed is shown.

A case is one operator, one codec (or all mixed), one shape and one dtype; within it tokens vary. Cases run in several
processes: nearly all of their time is Triton compiling a kernel for each codec and tile, under Python's lock.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ciuic_hf.bench.kernels.operands import Operand, activations, operand_of
from ciuic_kernels import BlockGrid, all_codecs, codec_by_name, ops
from ciuic_kernels.codec import Codec
from ciuic_kernels.packing import decode_tensor, encode_tensor
from ciuic_kernels.poison import poisoned_buffers
from ciuic_kernels.tolerances import exact_product, product_bound

ALL = "all codecs"
WORKERS = 8


@dataclass(frozen=True)
class Sizes:
    """What the gate runs over; the smallest sizes that reach every branch.

    Attributes:
        shapes: matrices ``[N, K]`` for every codec: whole blocks cut into several parts; all blocks at an edge.
        mixed_shapes: for all codecs mixed and one codec also: whole blocks beside those at an edge; one small block.
        experts: fused experts ``[E, N, K]`` for every codec.
        mixed_experts: the same for all codecs mixed.
        tokens: of linear: every launch of the default rules, and decode-then-GEMM.
        pairs: ``(tokens, experts of each)``: few and many rows of routed experts.
        ids: how many rows of a table are looked up.
    """

    shapes: tuple[tuple[int, ...], ...] = ((192, 4096), (40, 576))
    mixed_shapes: tuple[tuple[int, ...], ...] = ((150, 576), (5, 40))
    experts: tuple[tuple[int, ...], ...] = ((6, 128, 1024),)
    mixed_experts: tuple[tuple[int, ...], ...] = ((4, 70, 300),)
    tokens: tuple[int, ...] = (1, 3, 8, 16, 24, 33, 64, 128, 200, 260)
    pairs: tuple[tuple[int, int], ...] = ((1, 2), (9, 3), (40, 3))
    ids: int = 38


FULL = Sizes()
MIXED = (ALL, "grid4_g64")


@dataclass(frozen=True)
class Case:
    """One thing to check.

    Attributes:
        operator: ``linear``, ``experts``, ``dequantize`` or ``embedding``.
        codec: of all blocks, or ``ALL`` for a random one for every block.
        shape: ``(N, K)`` or ``(E, N, K)``.
    """

    operator: str
    codec: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.operator}, {self.codec}, {' x '.join(map(str, self.shape))}, {dtype}"


@dataclass(frozen=True)
class Failure:
    """One broken promise: in which case, and what came."""

    case: str
    what: str


def sampled_codecs() -> list[Codec]:
    """All codecs; of families that differ in their last number only, the first, the middle and the last."""
    families: dict[str, list[Codec]] = {}
    for codec in all_codecs():
        families.setdefault(codec.name.rstrip("0123456789"), []).append(codec)
    chosen = []
    for family in families.values():
        chosen += family if len(family) < 4 else [family[0], family[len(family) // 2], family[-1]]
    return chosen


def gate_cases(dtypes: Sequence[torch.dtype], sizes: Sizes = FULL) -> Iterator[Case]:
    """Every case, the slowest to compile first."""
    for codec in [ALL, *(codec.name for codec in sampled_codecs())]:
        mixed = codec in MIXED
        for dtype in dtypes:
            for shape in sizes.shapes + (sizes.mixed_shapes if mixed else ()):
                for operator in ("linear", "dequantize", "embedding"):
                    yield Case(operator, codec, shape, dtype)
            for shape in sizes.experts + (sizes.mixed_experts if mixed else ()):
                for operator in ("experts", "dequantize"):
                    yield Case(operator, codec, shape, dtype)


def check_case(case: Case, device: torch.device, sizes: Sizes = FULL) -> list[Failure]:
    """Run one case with every fresh buffer full of NaN. What it raises is a failure as well."""
    checks: dict[str, Callable[[Operand, Tensor, torch.dtype], list[tuple[str, str]]]] = {
        "linear": partial(_linear, tokens=sizes.tokens, biased=case.codec in MIXED),
        "experts": partial(_experts, pairs=sizes.pairs),
        "dequantize": _dequantize,
        "embedding": partial(_embedding, count=sizes.ids),
    }
    try:
        with poisoned_buffers():
            operand, dense = encoded(case.shape, case.codec, device)
            found = checks[case.operator](operand, dense, case.dtype)
    except Exception as error:
        found = [("", f"raised {type(error).__name__}: {error}")]
    return [Failure(f"{case}{at}", what) for at, what in found]


def encoded(shape: tuple[int, ...], codec: str, device: torch.device) -> tuple[Operand, Tensor]:
    """A parameter of Gaussian weights, and what the reference decodes it to on the CPU, float32.

    Args:
        codec: a name, or ``ALL`` for a random codec for every block.
    """
    generator = torch.Generator().manual_seed(0)
    source = (0.02 * torch.randn(shape, generator=generator)).half()  # the only dtype that all codecs take
    places = BlockGrid(shape).tags_shape[:-1]
    if codec == ALL:
        known = torch.tensor([c.id for c in sampled_codecs()], dtype=torch.uint8)
        ids = known[torch.randint(len(known), places, generator=generator)]
    else:
        ids = torch.full(places, codec_by_name(codec).id, dtype=torch.uint8)
    packed = encode_tensor(source, ids)
    dense = decode_tensor(packed).to(device)
    packed.arena, packed.tags = packed.arena.to(device), packed.tags.to(device)
    return operand_of(packed), dense


def _linear(
    operand: Operand, dense: Tensor, dtype: torch.dtype, tokens: Sequence[int], biased: bool
) -> list[tuple[str, str]]:
    found = []
    noise = torch.Generator().manual_seed(3)
    bias = torch.randn(operand.rows, generator=noise).to(dense.device, dtype)
    for count in tokens:
        x = activations(count, operand.cols, dtype, dense.device)
        for given in (None, bias) if biased else (None,):
            run = partial(ops.linear, x, *operand.stored, given, operand.rows, operand.cols)
            what = wrong_product(run, exact_product(x, dense, given), product_bound(x, dense, given), dtype)
            found += [(f", {count} tokens{'' if given is None else ', bias'}", text) for text in what]
    return found


def _experts(
    operand: Operand, dense: Tensor, dtype: torch.dtype, pairs: Sequence[tuple[int, int]]
) -> list[tuple[str, str]]:
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


def _dequantize(operand: Operand, dense: Tensor, dtype: torch.dtype) -> list[tuple[str, str]]:
    decoded = ops.dequantize(*operand.stored, operand.rows, operand.cols, dtype)
    return [("", "values differ from the reference")] if not torch.equal(decoded, dense.to(dtype)) else []


def _embedding(operand: Operand, dense: Tensor, dtype: torch.dtype, count: int) -> list[tuple[str, str]]:
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
    """What is wrong with two runs of a product: dtype, size, holes, error, differences between them."""
    first, second = run(), run()
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


def run_gate(
    cases: Sequence[Case],
    device: torch.device,
    advance: Callable[[str], None] = lambda _: None,
    workers: int | None = None,
    sizes: Sizes = FULL,
) -> list[Failure]:
    """All failures of all cases, in the order of the cases.

    Args:
        advance: called with the name of each case that is done.
        workers: processes; 0 for this one, by default as many as processors, 8 at most.
    """
    count = min(WORKERS, os.cpu_count() or 1) if workers is None else workers
    if count == 0:
        found = {}
        for place, case in enumerate(cases):
            found[place] = check_case(case, device, sizes)
            advance(str(case))
    else:
        found = _in_processes(cases, device, advance, count, sizes)
    return [failure for place in sorted(found) for failure in found[place]]


def _in_processes(
    cases: Sequence[Case], device: torch.device, advance: Callable[[str], None], count: int, sizes: Sizes
) -> dict[int, list[Failure]]:
    """The failures of each case by its place. A process that dies takes what it had not done with it: a failure."""
    found: dict[int, list[Failure]] = {}
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures: dict[Future[list[Failure]], int] = {
            pool.submit(check_case, case, device, sizes): place for place, case in enumerate(cases)
        }
        for future in as_completed(futures):
            place = futures[future]
            error = future.exception()
            died = [Failure(str(cases[place]), f"could not be run: {error}")]
            found[place] = future.result() if error is None else died
            advance(str(cases[place]))
    return found
