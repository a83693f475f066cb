"""What the ahead-of-time gate compiles: kernels with a launch setting, kinds of blocks, dtype and architecture.

A parameter's kernel is compiled for the one or two kinds that it holds, or for all. Each kind is compiled alone, where
one loop is one number; then one pair, and all, because a loop's neighbours can change how the compiler lays it out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ciuic_hf.planning.cache_formats import CACHE_BITS
from ciuic_kernels.attention import LATENT_TILES
from ciuic_kernels.codecs.grid import GRIDS, PLANES
from ciuic_kernels.work import ANY, ANY_SPARSE, ROUTED_SLOTS

ARCHES = (80, 89, 90, 100)
EXTREMES = (80, 90, 100)
"""sm_89 runs the code of sm_80 but for the allocation of registers, and the size of its shared memory."""

DECODE, PREFILL = (8, 1, 6), (64, 4, 4)
MIXED_PREFILL = (32, 2, 4)
"""What becomes of PREFILL where kinds are mixed (``Launch.of_kinds``)."""

DENSE = (0, 4, 3)
"""Of ``dequantize``, which has no tokens, and one loop for all grids."""

LAUNCHES = (DECODE, (16, 1, 6), (32, 2, 4), PREFILL)
"""Every (block_m, num_warps, num_stages) that the shipped rules can choose."""

ALL_KINDS = tuple(sorted(codec.id for codec in GRIDS.values()))
WEIGHTS = {width: GRIDS[width, 64].id for width in PLANES}
"""The kind of each width in groups of 64 columns."""

TYPICAL, HEAVIEST = GRIDS[4, 64].id, GRIDS[8, 32].id
MIXTURE = (WEIGHTS[4], HEAVIEST, ANY)
EVERY = (*ALL_KINDS, ANY)
"""What a matrix of two grids, or of more, is compiled for when it has edges (``work.compiled_kinds``)."""

HEADS = (16, 4, 3)
"""The launch that ``ciuic_kernels.attention`` chooses for heads."""

_NAMES = {codec.id: codec.name for codec in GRIDS.values()} | {ANY: "any", ANY_SPARSE: "sparse"}


@dataclass(frozen=True)
class Case:
    """One compilation.

    Attributes:
        kernel: ``linear``, ``linears``, ``experts_few``, ``experts_many``, ``dequantize``, ``embedding``,
            ``attend_heads`` or ``attend_latents``.
        arch: compute capability times ten.
        dtype: ``bf16`` or ``fp16``.
        kinds: as in ``work.build_work``; of attention the bits of the cache; of ``dequantize`` only those without a
            grid, as it reads every grid.
        launch: ``(block_m, num_warps, num_stages)``; of the last two kernels only the warps count.
        pairs: ``PAIRS`` of ``experts_few``.
        aligned: whether N and K are multiples of 16.
        masked: whether attention has a mask.
    """

    kernel: str
    arch: int
    dtype: str
    kinds: tuple[int, ...]
    launch: tuple[int, int, int] = DECODE
    pairs: int = ROUTED_SLOTS
    aligned: bool = True
    masked: bool = False

    @property
    def block_m(self) -> int:
        return self.launch[0]

    @property
    def num_warps(self) -> int:
        return self.launch[1]

    @property
    def setting(self) -> str:
        """Kernel, dtype and launch in words, as the budget file has them."""
        launch = "x".join(map(str, self.launch))
        pairs = f" pairs{self.pairs}" if self.kernel == "experts_few" else ""
        rest = ("" if self.aligned else " ragged") + (" masked" if self.masked else "")
        return f"{self.kernel} {self.dtype} {launch}{pairs}{rest}"

    @property
    def blocks(self) -> str:
        """The kinds in words."""
        if self.is_attention:
            return f"cache{self.kinds[0]}"
        return "+".join(_NAMES[kind] for kind in self.kinds) or "every"

    def __str__(self) -> str:
        return f"sm_{self.arch} {self.setting} {self.blocks}"

    @property
    def is_attention(self) -> bool:
        return self.kernel.startswith("attend")

    @property
    def is_decode(self) -> bool:
        return self.kernel == "linear" and self.dtype == "bf16" and self.launch == DECODE and self.aligned

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        fields: dict[str, Any] = json.loads(text)
        fields["kinds"], fields["launch"] = tuple(fields["kinds"]), tuple(fields["launch"])
        return cls(**fields)


def _others(arch: int) -> Iterator[Case]:
    """The kernels beside ``linear``, each once."""
    yield Case("experts_few", arch, "bf16", (TYPICAL,), DECODE)
    yield Case("experts_many", arch, "bf16", (TYPICAL,), PREFILL)
    yield Case("dequantize", arch, "bf16", (), DENSE)
    yield Case("embedding", arch, "bf16", (), (0, 1, 3))


def sibling_cases() -> list[Case]:
    """Several matrices in one launch: their loops are those of ``linear``, so one kind, and the pinned Triton, do."""
    return [Case("linears", 90, "bf16", (TYPICAL,))]


def attention_cases(arches: tuple[int, ...]) -> list[Case]:
    """Heads of 128 and DeepSeek-V3's latents: at 4 bits; on sm_90 at all, with a mask, and in float16."""
    cases = []
    latents = [(queries, warps, stages) for queries, _, warps, stages in LATENT_TILES]
    for arch in arches:
        for kernel, launches in (("attend_heads", [HEADS]), ("attend_latents", latents)):
            cases += [Case(kernel, arch, "bf16", (4,), launch) for launch in launches]
            if arch == 90:
                cases += [
                    Case(kernel, arch, "bf16", (bits,), launches[0]) for bits in CACHE_BITS if bits != 4
                ]
                cases += [Case(kernel, arch, "bf16", (4,), launches[0], masked=True)]
                cases += [Case(kernel, arch, "fp16", (4,), launches[0])]
                cases += [Case(kernel, arch, "bf16", (8,), launch) for launch in launches[1:]]
    return cases


def end_attention_cases() -> list[Case]:
    """What of these the first and the last supported Triton compile: every launch, at 4 bits, on sm_90."""
    return [
        case
        for case in attention_cases((90,))
        if case.kinds == (4,) and case.dtype == "bf16" and not case.masked
    ]


def fast_cases() -> list[Case]:
    """For every change: products, and attention on sm_90, without what says little beside its neighbours."""
    return [case for case in (*_products(), *attention_cases((90,))) if not _is_between(case)]


def _is_between(case: Case) -> bool:
    """Whether a neighbour on either side is compiled as well: between the ends of widths, launches and caches."""
    if case.is_attention:
        return case.kinds == (3,) or (case.dtype == "fp16" and case.kernel == "attend_latents")
    if case.kernel != "linear" or case.dtype != "bf16":
        return False
    if case.arch != 90:  # sm_89: the most shared memory only
        return case.launch not in ((PREFILL,) if case.arch == 89 else (DECODE, PREFILL))
    return case.kinds in [(GRIDS[width, 32].id,) for width in PLANES if 2 < width < 8]


def _products() -> list[Case]:
    """All kinds in decode on sm_90, one or two of everything else."""
    cases = [Case("linear", 90, "bf16", (kind,)) for kind in (*ALL_KINDS, ANY)]
    cases += [Case("linear", arch, "bf16", (TYPICAL,), launch) for arch in ARCHES for launch in LAUNCHES]
    cases += [Case("linear", arch, "bf16", (HEAVIEST,)) for arch in ARCHES]
    cases += [Case("linear", 90, "bf16", MIXTURE), Case("linear", 90, "fp16", (TYPICAL,))]
    cases += _others(90)
    cases += [
        Case("experts_few", 90, "bf16", MIXTURE),
        Case("experts_many", 90, "bf16", MIXTURE, MIXED_PREFILL),
    ]
    cases += [Case("experts_few", 80, "bf16", (TYPICAL,), DECODE), *sibling_cases()]
    return list(dict.fromkeys(cases))


def end_cases() -> list[Case]:
    """For the first and the last supported Triton: all kinds in decode, one or two of everything else, everywhere."""
    cases = [case for case in _products() if case not in sibling_cases()]
    cases += [Case("linear", arch, "bf16", (kind,)) for arch in ARCHES for kind in (*ALL_KINDS, ANY)]
    cases += [Case("linear", arch, "bf16", (HEAVIEST,), launch) for arch in EXTREMES for launch in LAUNCHES]
    cases += [Case("linear", arch, "bf16", MIXTURE) for arch in ARCHES]
    cases += [Case("linear", 90, "bf16", EVERY)]
    cases += [case for arch in ARCHES for case in _others(arch)]
    cases += end_attention_cases()
    return list(dict.fromkeys(cases))


def full_cases() -> list[Case]:
    """For the pinned Triton: those, attention, float16, all launches of experts, mixtures in prefill, odd N and K."""
    cases = [*end_cases(), *sibling_cases(), *attention_cases(ARCHES)]
    for arch in EXTREMES:
        cases += [Case("linear", arch, "bf16", (ANY,), launch) for launch in LAUNCHES]
        cases += [Case("experts_few", arch, "bf16", (TYPICAL,), launch) for launch in LAUNCHES]
        cases += [Case("experts_many", arch, "bf16", (TYPICAL,), (16, 1, 6))]
        cases += [Case("linear", arch, "bf16", MIXTURE, MIXED_PREFILL)]
        cases += [
            Case("linear", arch, "bf16", (TYPICAL,), launch, aligned=False) for launch in (DECODE, PREFILL)
        ]
        cases += [Case("linear", arch, "fp16", (kind,)) for kind in (TYPICAL, HEAVIEST)]
        cases += [Case("linear", arch, "fp16", (TYPICAL,), PREFILL)]
        cases += [
            Case("dequantize", arch, "fp16", (), DENSE),
            Case("dequantize", arch, "bf16", (ANY,), DENSE),
        ]
        cases += [Case("dequantize", arch, "bf16", (ANY, ANY_SPARSE), DENSE)]
        cases += [Case("linears", arch, "bf16", (TYPICAL,), (32, 2, 4))]
    cases += [Case("linear", 90, "fp16", (kind,)) for kind in ALL_KINDS]
    cases += [Case("linear", 80, "bf16", EVERY), Case("linear", 90, "bf16", EVERY, MIXED_PREFILL)]
    return list(dict.fromkeys(cases))
