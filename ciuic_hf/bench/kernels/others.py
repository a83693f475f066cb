"""What is timed beside products: siblings in one launch, decoding to dense, and attention to a packed cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from ciuic_hf.bench.kernels.operands import activations, random_operand, random_weight, together
from ciuic_hf.bench.kernels.products import CUBLAS, Format
from ciuic_hf.bench.kernels.shapes import WeightShape, standard
from ciuic_hf.bench.kernels.timing import Call, Timer, Timing
from ciuic_hf.planning.cache_formats import CHUNK, ChannelFormat, cache_formats
from ciuic_hf.runtime.cache.encoding import empty_record
from ciuic_kernels import ops

APART = "launches of their own"
BF16 = "bf16"


@dataclass
class OtherRow:
    """One comparison.

    Attributes:
        kind: ``siblings``, ``dequantize`` or ``attention``.
        tokens: rows of x; of attention, tokens in the cache; 0 where there are none.
        nbytes: that have to be read and written.
        peers: seconds of the others, by name.
        errors: why one of them (or ours, as ``ciuic``) has no time.
    """

    kind: str
    name: str
    bits: float
    tokens: int
    nbytes: int
    seconds: float | None = None
    peers: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        of = f", {self.tokens} tokens" if self.tokens else ""
        return f"{self.kind}, {self.name}, {self.bits:g} bits{of}"

    def timed(self, ours: Call, theirs: dict[str, Call], timer: Timer) -> OtherRow:
        """This row with times."""
        with torch.inference_mode():
            timings = timer.medians([ours, *theirs.values()])
        found: dict[str, Timing] = dict(zip(("ciuic", *theirs), timings, strict=True))
        self.errors = {name: timing.error for name, timing in found.items() if timing.seconds is None}
        seconds = {name: t.seconds for name, t in found.items() if t.seconds is not None}
        self.seconds = seconds.pop("ciuic", None)
        self.peers = seconds
        return self


@dataclass(frozen=True)
class Family:
    """Linears that are called with one x."""

    name: str
    rows: tuple[int, ...]
    cols: int


FAMILIES = (
    Family("V3 q_a, kv_a", (1536, 576), 7168),
    Family("V2-Lite q, kv_a", (3072, 576), 2048),
    Family("7B q, k, v", (3584, 512, 512), 3584),
    Family("7B gate, up", (18944, 18944), 3584),
    Family("32B q, k, v", (5120, 1024, 1024), 5120),
    Family("V3 dense gate, up", (18432, 18432), 7168),
)


@dataclass(frozen=True)
class Attended:
    """A cache that one new token attends to.

    Attributes:
        heads: of the model; ``cached``: of the cache, 1 of latents.
        widths: of a key and a value; of latents their rank and the width of the rotary part.
    """

    name: str
    heads: int
    cached: int
    widths: tuple[int, int]
    latent: bool


CACHES = (
    Attended("8 heads of 128, 32 of queries", 32, 8, (128, 128), False),
    Attended("V3 latents, 128 heads", 128, 1, (512, 64), True),
    Attended("V3 latents, 16 heads", 16, 1, (512, 64), True),
)
LENGTHS, CACHED_BITS = (4096, 32768), (8, 4, 2)
SIBLING_TOKENS = (1, 8, 32)
DECODED = ("V3 shared gate_up", "V3 dense gate_proj")


def measure_siblings(
    families: Sequence[Family],
    formats: Sequence[Format],
    tokens: Sequence[int],
    timer: Timer,
    device: torch.device,
) -> Iterator[OtherRow]:
    """One launch against as many as there are matrices, and cuBLAS."""
    for family in families:
        dense = [random_weight((rows, family.cols), device, seed) for seed, rows in enumerate(family.rows)]
        for form in formats:
            shapes = [WeightShape(family.name, rows, family.cols) for rows in family.rows]
            operands = [random_operand(shape, form.setting, device) for shape in shapes]
            nbytes = sum(operand.packed.nbytes for operand in operands)
            for count in tokens:
                x = activations(count, family.cols, torch.bfloat16, device)
                unbiased = [False] * len(shapes)
                ours = partial(
                    ops.linears, x, *together(operands), [], unbiased, list(family.rows), family.cols
                )
                alone = [
                    partial(ops.linear, x, *operand.stored, None, operand.rows, operand.cols)
                    for operand in operands
                ]
                theirs = [partial(linear, x, weight) for weight in dense]
                row = OtherRow("siblings", family.name, form.bits, count, nbytes)
                yield row.timed(ours, {APART: partial(_each, alone), CUBLAS: partial(_each, theirs)}, timer)


def _each(calls: Sequence[Call]) -> list[object]:
    return [call() for call in calls]


def measure_decoding(
    names: Sequence[str], formats: Sequence[Format], timer: Timer, device: torch.device
) -> Iterator[OtherRow]:
    """A whole matrix to bfloat16, against a copy of it in bfloat16."""
    for name in names:
        shape = standard(name)
        dense = random_weight(shape.shape, device)
        for form in formats:
            operand = random_operand(shape, form.setting, device)
            ours = partial(ops.dequantize, *operand.stored, shape.rows, shape.cols, torch.bfloat16)
            row = OtherRow("dequantize", shape.name, form.bits, 0, operand.packed.nbytes + dense.nbytes)
            yield row.timed(ours, {"bf16 copy": dense.clone}, timer)


def measure_attention(
    caches: Sequence[Attended],
    lengths: Sequence[int],
    bits: Sequence[int],
    timer: Timer,
    device: torch.device,
) -> Iterator[OtherRow]:
    """One token of one sequence: against torch's attention to a bfloat16 cache, or to latents with absorbed weights."""
    for cache in caches:
        for tokens in lengths:
            generator = torch.Generator(device).manual_seed(8)
            key, value, query, rope = (
                torch.randn(1, heads, count, width, generator=generator, device=device).to(torch.bfloat16)
                for heads, count, width in (
                    (cache.cached, tokens, cache.widths[0]),
                    (cache.cached, tokens, cache.widths[1]),
                    (cache.heads, 1, cache.widths[0]),
                    (cache.heads, 1, cache.widths[1]),
                )
            )
            scale = sum(cache.widths[: 1 + cache.latent]) ** -0.5
            if cache.latent:
                theirs = partial(_absorbed, query, rope, key, value, scale)
            else:
                theirs = partial(
                    scaled_dot_product_attention, query, key, value, scale=scale, enable_gqa=True
                )
            for width in bits:
                formats = cache_formats(width, cache.latent)
                pages, codes = _random_pages(key, value, width, cache.latent)
                nbytes = cache.cached * formats.nbytes(tokens, *cache.widths)
                ours = partial(
                    ops.attend_packed, query, rope if cache.latent else None, *pages, None, scale, *codes,
                    cache.widths[0] if cache.latent else cache.widths[1],
                )  # fmt: skip
                row = OtherRow("attention", cache.name, width, tokens, nbytes)
                yield row.timed(ours, {BF16: theirs}, timer)


def _absorbed(query: Tensor, rope: Tensor, latents: Tensor, rotary: Tensor, scale: float) -> Tensor:
    """Latents are keys and values of all heads, so heads are rows of two products."""
    q, r = query[:, :, 0], rope[:, :, 0]
    scores = torch.baddbmm(q @ latents[:, 0].mT, r, rotary[:, 0].mT)
    return (scores * scale).softmax(-1, dtype=torch.float32).to(q.dtype) @ latents[:, 0]


def _random_pages(
    key: Tensor, value: Tensor, bits: int, latent: bool
) -> tuple[tuple[list[Tensor], Tensor, Tensor, Tensor], tuple[int, int, int, int]]:
    """Full pages of random codes for a cache like these, and the codes' formats: as ``attend_packed`` takes them."""
    formats, device, number = cache_formats(bits, latent), key.device, key.shape[2] // CHUNK
    generator = torch.Generator(device).manual_seed(9)
    records: list[Tensor] = []
    for _ in range(number):
        for like, fmt in ((key, formats.keys), (value, formats.values)):
            record = empty_record(like, CHUNK, fmt)
            for part in record:
                if part.dtype == torch.uint8:
                    part.random_(0, 256, generator=generator)
                else:
                    part.normal_(generator=generator)
            scales = record[-2] if isinstance(fmt, ChannelFormat) else record[-1]
            scales.fill_(144)  # 2 ^ ((144 - 168) / 8)
            records += record
    parts = len(records) // number
    table = [(CHUNK, page * CHUNK, CHUNK) for page in range(number)]
    pages = torch.tensor(table, dtype=torch.int32, device=device)
    count = torch.tensor([number], dtype=torch.int32, device=device)
    codes = (formats.keys.bits, formats.keys.group, formats.values.bits, formats.values.group)
    return (records, ops.page_addresses(records, parts).to(device), pages, count), codes
