"""The gate: every GPU kernel against float64, with the bound that the tests use. Red means that no speed is shown.

A case is one operator, one choice of codecs, one shape and one dtype; within it tokens vary. What is compared is in
``checks.py``, in which process in ``workers.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ciuic_hf.bench.kernels import checks
from ciuic_hf.planning.cache_formats import CACHE_BITS
from ciuic_kernels import all_codecs
from ciuic_kernels.codec import Codec
from ciuic_kernels.poison import poisoned_buffers
from ciuic_kernels.selection import MAX_TOKENS, SHARED_BLOCK_M
from ciuic_kernels.work import ROUTED_SLOTS

ALL = "all codecs"
SEVERAL = "several codecs"
MIXTURES = {SEVERAL: ("grid4_g64", "grid3_g32", "sparse4_d12", "raw_bf16", "zero")}
"""Names of choices of codecs -> those that blocks have at random; ``ALL`` is of all."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """What the gate runs over; the smallest sizes that reach every branch.

    Attributes:
        codecs: choices, ``ALL``, ``SEVERAL`` or one codec; None for ``ALL`` and each of ``sampled_codecs``.
        mixed: choices that are checked more thoroughly: with the mixed shapes and siblings; the last with other inputs.
        shapes: matrices ``[N, K]`` for every codec: whole blocks cut into several parts; all blocks at an edge.
        mixed_shapes: for ``mixed`` also, with a bias: whole blocks beside those at an edge; one small block.
        experts: fused experts ``[E, N, K]`` for every codec.
        mixed_experts: the same for ``mixed``.
        tokens: of linear: every launch of the default rules, and decode-then-GEMM.
        siblings: rows of matrices that are multiplied together, and their columns last.
        sibling_tokens: tiles of every size that siblings share, and one more.
        pairs: ``(tokens, experts of each)``: few and many rows of routed experts.
        ids: how many rows of a table are looked up.
        cache_bits: of packed pages that are attended to; ``pages``: tokens and capacity of each.
        queries: heads of the model for each of the cache, and new tokens.
        heads, latents: shapes of their caches, ``check_attention`` has the order.
    """

    codecs: tuple[str, ...] | None = None
    mixed: tuple[str, ...] = (ALL, SEVERAL, "grid4_g64")
    shapes: tuple[Shape, ...] = ((192, 4096), (40, 576))
    mixed_shapes: tuple[Shape, ...] = ((150, 576), (5, 40))
    experts: tuple[Shape, ...] = ((6, 128, 1024),)
    mixed_experts: tuple[Shape, ...] = ((4, 70, 300),)
    tokens: tuple[int, ...] = (1, 3, 8, 16, 24, 33, 64, 128, 200, 260)
    siblings: tuple[Shape, ...] = ((192, 70, 64, 1024), (128, 300, 256))
    sibling_tokens: tuple[int, ...] = (1, 8, 16, 32, 33)
    pairs: tuple[tuple[int, int], ...] = ((1, 2), (9, 3), (40, 3))
    ids: int = 38
    cache_bits: tuple[int, ...] = CACHE_BITS
    pages: tuple[tuple[int, int], ...] = ((512, 512), (512, 512), (200, 512))
    queries: tuple[tuple[int, int], ...] = ((4, 1), (5, 2), (1, 8))
    heads: tuple[Shape, ...] = ((2, 128, 128), (1, 40, 72))
    latents: tuple[Shape, ...] = ((1, 512, 64), (1, 136, 24))


FULL = Sizes()
SMALL = Sizes(
    codecs=(SEVERAL, "grid4_g64"),
    mixed=(SEVERAL,),
    shapes=((192, 1024),),
    mixed_experts=(),
    experts=((4, 70, 300),),
    tokens=(1, 16, 32, 64, 260),
    siblings=((128, 70, 64, 300),),
    sibling_tokens=(3, 33),
    pairs=((9, 3), (40, 3)),
    ids=8,
    cache_bits=(8, 4),
    heads=((2, 128, 128),),
    latents=((1, 512, 64),),
)
"""For compute-sanitizer, under which kernels take tens of times as long and each has to be compiled before."""


@dataclass(frozen=True)
class Case:
    """One thing to check.

    Attributes:
        operator: ``linear``, ``linears``, ``inputs``, ``experts``, ``dequantize``, ``embedding``, ``heads`` or
            ``latents``.
        codec: of all blocks, or a choice of several; ``4-bit cache`` and so on of the last two.
        shape: ``(N, K)`` or ``(E, N, K)``; of linears the rows of each and their columns.
        sizes: tokens of linear and linears; of experts pairs ``(tokens, experts of each)``.
    """

    operator: str
    codec: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sizes: tuple[Any, ...] = ()

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


def codecs_of(choice: str) -> Sequence[str]:
    """The codecs that the blocks of a case have."""
    return [codec.name for codec in sampled_codecs()] if choice == ALL else MIXTURES.get(choice, (choice,))


def gate_cases(dtypes: Sequence[torch.dtype], sizes: Sizes = FULL) -> Iterator[Case]:
    """Every case, the slowest to compile first.

    A kernel of all codecs takes half a minute to compile, so it is compiled for the first dtype only, and by one case:
    its tokens are spread over cases by the tile they take, and its products have a bias or not by their shape.
    """
    codecs = sizes.codecs or (ALL, *(codec.name for codec in sampled_codecs()))
    for choice in codecs:
        for dtype in dtypes:
            yield from _cases_of(SEVERAL if choice == ALL and dtype != dtypes[0] else choice, dtype, sizes)
        if choice == codecs[0]:
            yield from _attention_cases(dtypes, sizes)


def _cases_of(codec: str, dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    mixed = codec in sizes.mixed
    for shape in sizes.shapes + (sizes.mixed_shapes if mixed else ()):
        for tokens in _by_tile(sizes.tokens) if mixed else [sizes.tokens]:
            yield Case("linear", codec, shape, dtype, tokens)
    for shape in sizes.siblings[: 1 if codec == ALL else None] if mixed else ():
        shared = [tokens for tokens in sizes.sibling_tokens if codec != ALL or tokens <= SHARED_BLOCK_M]
        yield from (Case("linears", codec, shape, dtype, tokens) for tokens in _by_tile(shared))
    for shape in sizes.experts + (sizes.mixed_experts if mixed else ()):
        few = tuple(pair for pair in sizes.pairs if pair[0] * pair[1] <= ROUTED_SLOTS)
        for pairs in (few, tuple(pair for pair in sizes.pairs if pair not in few)):
            yield Case("experts", codec, shape, dtype, pairs)
        yield Case("dequantize", codec, shape, dtype)
    for shape in sizes.shapes + (sizes.mixed_shapes if mixed else ()):
        yield from (Case(operator, codec, shape, dtype) for operator in ("dequantize", "embedding"))
    if codec == sizes.mixed[-1]:
        yield from (Case("inputs", codec, shape, dtype) for shape in sizes.mixed_shapes[:1])


def _by_tile(tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """By the tile of the default rules, where products of many kinds have the third for all others."""
    for low, high in ((0, 8), (8, 16), (16, MAX_TOKENS)):
        found = tuple(count for count in tokens if low < count <= high)
        if found:
            yield found


def _attention_cases(dtypes: Sequence[torch.dtype], sizes: Sizes) -> Iterator[Case]:
    for dtype in dtypes:
        for operator, shapes in (("heads", sizes.heads), ("latents", sizes.latents)):
            for bits in sizes.cache_bits:
                yield from (Case(operator, f"{bits}-bit cache", shape, dtype) for shape in shapes)


def check_case(case: Case, device: torch.device, sizes: Sizes = FULL) -> list[Failure]:
    """Run one case with every fresh buffer full of NaN. What it raises is a failure as well."""
    try:
        with poisoned_buffers():
            found = _check_of(case, sizes)(device)
    except Exception as error:
        at = f", one of {', '.join(map(str, case.sizes))}" if case.sizes else ""
        found = [(at, f"raised {type(error).__name__}: {error}")]
    return [Failure(f"{case}{at}", what) for at, what in found]


def _check_of(case: Case, sizes: Sizes) -> Callable[[torch.device], checks.Found]:
    """What compares a case, on a device."""
    if case.operator in ("heads", "latents"):
        bits, latent = int(case.codec.split("-")[0]), case.operator == "latents"
        return partial(
            checks.check_attention, latent, bits, case.shape, case.dtype, sizes=list(sizes.pages),
            queries=sizes.queries, masked=bits == 4,
        )  # fmt: skip
    codecs = codecs_of(case.codec)
    if case.operator == "linears":
        return lambda device: checks.check_linears(
            [
                checks.encoded((rows, case.shape[-1]), codecs, device, seed)
                for seed, rows in enumerate(case.shape[:-1])
            ],
            case.dtype,
            case.sizes,
        )
    of_one: dict[str, Callable[..., checks.Found]] = {
        "linear": partial(checks.check_linear, tokens=case.sizes, biased=case.shape in sizes.mixed_shapes),
        "experts": partial(checks.check_experts, pairs=case.sizes),
        "dequantize": checks.check_dequantize,
        "embedding": partial(checks.check_embedding, count=sizes.ids),
        "inputs": checks.check_inputs,
    }
    check = of_one[case.operator]
    return lambda device: check(*checks.encoded(case.shape, codecs, device), case.dtype)
