"""The kernels as compiled for a GPU, executed instruction by instruction, against float64: no GPU, real bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ciuic_hf.planning.cache_formats import CACHE_BITS
from ciuic_kernels import ops
from ciuic_kernels.codecs.grid import GRIDS
from ciuic_kernels.selection import Launch
from ciuic_kernels.triton.linear import linear
from tests.kernels.operands import Operand, activations, together
from tests.kernels.samples import packed_sample
from tests.kernels.tolerances import assert_product
from tests.triton import test_attention as attention
from tests.triton.emulator import machine
from tests.triton.emulator.launch import Gpu, emulated
from tests.triton.interpreted import counters, needs_interpreter, operand_of, random_ids, sample
from tests.triton.pages import pages_of
from tests.triton.test_products import assert_routed

pytestmark = [
    needs_interpreter,
    pytest.mark.skipif(machine.compiler() is None, reason="the emulator is built with a C compiler"),
]
slow = pytest.mark.slow
BF16, FP16 = torch.bfloat16, torch.float16
EVERY = [pytest.param(arch, marks=slow, id=f"sm_{arch}") for arch in (80, 89, 90)]
AMPERE = [pytest.param(80, id="sm_80"), *EVERY[1:]]
HOPPER = [*EVERY[:2], pytest.param(90, id="sm_90")]
ORDERS = ("forwards", "backwards", 1)
MIXED = ("grid4_g64", "grid8_g32", "raw_fp16", "zero", "sparse")


def check_linear(
    arch: int,
    codecs: tuple[str, ...],
    shape: tuple[int, int],
    tokens: int,
    dtype: torch.dtype = BF16,
    bias: bool = False,
) -> Gpu:
    """A product is within its bound; its counters are zero again."""
    w = sample(shape, 3, codecs)
    x = activations(tokens, shape[1], dtype=dtype)
    added = activations(shape[0], dtype=dtype, seed=2) if bias else None
    with emulated(arch) as gpu:
        y = ops.linear(x, *w.stored, added, w.rows, w.cols)
    assert_product(y, x, w.dense, added)
    assert not counters(w).any()
    return gpu


@pytest.mark.parametrize("arch", AMPERE)
def test_shares_of_a_strip_in_any_order(arch: int) -> None:
    """Whichever program comes last adds the parts: the same bits."""
    w = operand_of(packed_sample((128, 640), 3, ("grid4_g64",)))
    x = activations(4, 640, dtype=BF16)
    results = []
    for order in ORDERS:
        with emulated(arch, order) as gpu:
            launch = Launch(8, 1, 6, 64)
            results.append(
                linear(
                    x=x, arena=w.arena, tags=w.tags, work=w.derived.work, kinds=w.derived.kinds, bias=None, rows=128,
                    launch=launch,
                )
            )  # fmt: skip
        assert gpu.launches[0].grid[1] > 1
        assert not counters(w).any()
    assert_product(results[0], x, w.dense)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@slow
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("codec", [codec.name for codec in GRIDS.values()])
@pytest.mark.parametrize("arch", EVERY)
def test_decoding_each_grid(arch: int, codec: str, dtype: torch.dtype) -> None:
    check_linear(arch, (codec,), (128, 512), 8, dtype)


@pytest.mark.parametrize("arch", HOPPER)
def test_tiles_of_64_tokens(arch: int) -> None:
    """On sm_90 these are wgmma."""
    check_linear(arch, ("grid4_g64",), (128, 256), 60)


@slow
@pytest.mark.parametrize("tokens", [1, 16, 30, 64, 130, 256])
@pytest.mark.parametrize("codec", ["grid2_g64", "grid3_g32", "grid5_g64", "grid8_g32"])
@pytest.mark.parametrize("arch", EVERY)
def test_every_launch(arch: int, codec: str, tokens: int) -> None:
    check_linear(arch, (codec,), (192, 384), tokens, FP16 if codec == "grid5_g64" else BF16, bias=True)


@slow
@pytest.mark.parametrize("tokens", [5, 20, 100])
@pytest.mark.parametrize("codecs", [("grid4_g64",), ("grid4_g64", "grid3_g32"), MIXED, ()], ids=str)
@pytest.mark.parametrize("shape", [(150, 328), (70, 203)], ids=str)
@pytest.mark.parametrize("arch", EVERY)
def test_mixtures_and_edges(arch: int, shape: tuple[int, int], codecs: tuple[str, ...], tokens: int) -> None:
    """Kinds that are called as functions; rows and columns that fill no block, addresses that are not aligned."""
    check_linear(arch, codecs, shape, tokens, bias=True)


@slow
@pytest.mark.parametrize("biased", [(False, False, False), (True, False, True)])
@pytest.mark.parametrize("arch", EVERY)
def test_several_matrices_in_one_launch(arch: int, biased: tuple[bool, ...]) -> None:
    operands = [sample((rows, 512), rows, ("grid4_g64",)) for rows in (128, 64, 192)]
    x = activations(7, 512, dtype=BF16)
    biases = [
        activations(w.rows, dtype=BF16) if has else None for w, has in zip(operands, biased, strict=True)
    ]
    with emulated(arch) as gpu:
        some = [bias for bias in biases if bias is not None]
        results = ops.linears(x, *together(operands), some, list(biased), [w.rows for w in operands], 512)
    assert [launch.kernel for launch in gpu.launches] == ["linears_kernel"]
    for y, w, bias in zip(results, operands, biases, strict=True):
        assert_product(y, x, w.dense, bias)


@slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rows", [1, 3, 40, 90])
@pytest.mark.parametrize("codecs", [("grid4_g64",), ("grid4_g64", "grid3_g64", "raw_fp16", "zero")], ids=str)
@pytest.mark.parametrize("arch", EVERY)
def test_routed_rows(arch: int, codecs: tuple[str, ...], rows: int, order: str | int) -> None:
    """Few pairs and many, ids that no expert has."""
    w = sample((4, 70, 300), 3, codecs)
    ids = random_ids((rows, 2), 4, rows)
    x = activations(rows, 300, dtype=BF16)
    with emulated(arch, order):
        y = ops.expert_linear(x, ids, *w.stored, w.rows, w.cols)
    assert_routed(y, x, ids, w)
    assert not counters(w).any()


@pytest.mark.parametrize("arch", HOPPER)
def test_rows_of_a_table(arch: int) -> None:
    w = sample((130, 300))
    ids = torch.tensor([0, 129, 64, 64, 63])
    with emulated(arch):
        assert torch.equal(ops.embedding(ids, *w.stored, w.rows, w.cols, BF16), w.dense[ids].to(BF16))


@slow
@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32])
@pytest.mark.parametrize("codecs", [("grid4_g64",), ("grid4_g64", "grid3_g32"), ()], ids=str)
@pytest.mark.parametrize("shape", [(130, 300), (128, 256), (3, 70, 140)], ids=str)
@pytest.mark.parametrize("arch", EVERY)
def test_decoding_is_exact(
    arch: int, shape: tuple[int, ...], codecs: tuple[str, ...], dtype: torch.dtype
) -> None:
    w: Operand = sample(shape, 2, codecs)
    with emulated(arch):
        assert torch.equal(ops.dequantize(*w.stored, w.rows, w.cols, dtype), w.dense.to(dtype))


# Attention to a packed cache

LATENT = [(128, 128), (27, 128)]


def heads(bits: int, dtype: torch.dtype, widths: tuple[int, int], mask: str = "") -> None:
    pages = pages_of(bits, False, attention.RAGGED, heads=1, widths=widths)
    hidden = attention.mask_of(mask, 333, 2).expand(2, 2, -1) if mask else None
    attention.check(attention.queries(pages, 4, 2, dtype), None, pages, hidden, splits=2)


def latents(bits: int, dtype: torch.dtype, widths: tuple[int, int], mask: str = "") -> None:
    pages = pages_of(bits, True, LATENT, heads=1, widths=widths)
    hidden = attention.mask_of(mask, 155, 2).expand(2, 2, -1) if mask else None
    query, rope = (torch.randn(2, 5, 2, width).to(dtype) for width in widths)
    attention.check(query, rope, pages, hidden, splits=2)


@pytest.mark.parametrize("arch", AMPERE)
def test_attention(arch: int) -> None:
    with emulated(arch):
        heads(4, BF16, (40, 72))


@slow
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("bits", CACHE_BITS)
@pytest.mark.parametrize(
    ("kind", "widths"), [(heads, (40, 72)), (heads, (128, 128)), (latents, (136, 24)), (latents, (512, 64))]
)
@pytest.mark.parametrize("arch", EVERY)
def test_attention_of_all_widths(
    arch: int, kind: Callable[..., None], widths: tuple[int, int], bits: int, dtype: torch.dtype
) -> None:
    with emulated(arch, 5):
        kind(bits, dtype, widths)


@slow
@pytest.mark.parametrize("mask", ["padding", "of each token"])
@pytest.mark.parametrize("kind", [heads, latents])
@pytest.mark.parametrize("arch", EVERY)
def test_attention_with_a_mask(arch: int, kind: Callable[..., None], mask: str) -> None:
    with emulated(arch):
        kind(4, BF16, (40, 24), mask)


# Mistakes in real kernels are found


def test_a_table_that_points_outside_is_found() -> None:
    w = sample((128, 640), 3, ("grid4_g64",))
    work = w.derived.work.clone()
    work[0] = w.arena.numel() // 16
    x: Tensor = activations(4, 640, dtype=BF16)
    with emulated(80), pytest.raises(machine.KernelFault, match="global outside at arena"):
        ops.linear(x, w.arena, w.tags, w.derived.offsets, work, w.derived.kinds, None, w.rows, w.cols)


def test_a_wait_taken_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernel whose loop waits for one copy less."""
    from tests.triton.emulator import launch

    w, x = sample((128, 640), 3, ("grid4_g64",)), activations(4, 640, dtype=BF16)

    def wrong(compiled: launch.Compiled) -> machine.Kernel:
        text = compiled.ptx.replace("cp.async.wait_group \t", "cp.async.wait_group \t1")
        assert text != compiled.ptx
        return machine.Kernel(text, compiled.warps, compiled.shared)

    monkeypatch.setattr(launch, "_kernel", wrong)
    with emulated(80), pytest.raises(machine.KernelFault) as found:
        ops.linear(x, *w.stored, None, w.rows, w.cols)
    assert found.value.kind == "shared_in_flight"
