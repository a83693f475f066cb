"""The emulator itself: instructions against numpy and the PTX manual, and each kind of mistake it is there to find."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ciuic_kernels.triton import _asm
from tests.triton import ptx
from tests.triton.emulator import machine
from tests.triton.emulator.machine import Kernel, KernelFault, Region
from tests.triton.emulator.operands import UnsupportedPtx

pytestmark = pytest.mark.skipif(machine.compiler() is None, reason="the emulator is built with a C compiler")
AT = 0x1000
LANES = 32

ADDRESSES = """
    ld.param.b64 %rd1, [k_param_0];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    mov.b32 %r2, global_smem;
    shl.b32 %r3, %r1, 2;
    add.s32 %r4, %r2, %r3;
"""
"""%rd3: word of this thread in global memory, %r4: in shared memory."""


def kernel(body: str, warps: int = 1, shared: int = 4096) -> Kernel:
    return Kernel(
        f""".version 8.7
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
\t.param .u64 .ptr .global .align 1 k_param_0
)
{{
\t.reg .pred %p<20>;
\t.reg .b16 %rs<20>;
\t.reg .b32 %r<400>;
\t.reg .b64 %rd<20>;
{ADDRESSES}
{body}
\tret;
}}
""",
        warps,
        shared,
    )


def run(
    body: str, memory: np.ndarray, warps: int = 1, shared: int = 4096, grid: int = 1, **how: object
) -> None:
    """Run with ``memory`` as what the parameter points at."""
    written = how.pop("written", None)
    region = Region(AT, memory.view(np.uint8).reshape(-1), "memory", written)  # type: ignore[arg-type]
    kernel(body, warps, shared).run((grid, 1, 1), [AT], [region], **how)  # type: ignore[arg-type]


def fault(body: str, words: int = 1024, **how: object) -> KernelFault:
    with pytest.raises(KernelFault) as found:
        run(body, np.zeros(words, np.uint32), **how)  # type: ignore[arg-type]
    return found.value


# Arithmetic


@pytest.mark.parametrize("key", [(3, 1, False), (8, 2, False), (6, 3, True)])
def test_a_snippet_gives_what_numpy_gives(key: tuple[int, int, bool]) -> None:
    """lop3, shifts, and fused multiply-adds of 16-bit floats: an implementation in numpy has the same bits."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 1 << 32, (2, LANES), dtype=np.uint32)
    wanted, _ = ptx.run(_asm.UNPACK[key], r4=words[0], r5=words[1])
    text = re.sub(r"\$(\d)", r"%r1\1", _asm.UNPACK[key])
    memory = np.concatenate([words, np.zeros((4, LANES), np.uint32)])
    loads = "ld.global.b32 {%r14}, [%rd3 + 0]; ld.global.b32 {%r15}, [%rd3 + 128];"
    stores = " ".join(f"st.global.b32 [%rd3 + {256 + 128 * i}], {{%r1{i}}};" for i in range(4))
    run(loads + text + stores, memory)
    for i in range(4):
        np.testing.assert_array_equal(memory[2 + i], wanted[f"${i}"])


@pytest.mark.parametrize("half", [False, True])
def test_fused_multiply_adds_round_once(half: bool) -> None:
    """Against exact rational arithmetic, where rounding to float32 or float64 first would be seen."""
    from fractions import Fraction

    kind, mantissa = ("f16", 10) if half else ("bf16", 7)
    rng = np.random.default_rng(1)
    values = rng.integers(-(2 << mantissa), 2 << mantissa, (3, 4 * LANES)) * 2.0 ** rng.integers(
        -12, -5, (3, 4 * LANES)
    )
    values[2, ::2] = -(values[0] * values[1])[::2]  # nearly cancels

    def bits(x: np.ndarray) -> np.ndarray:
        if half:
            return x.astype(np.float16).view(np.uint16).astype(np.uint32)
        return x.astype(np.float32).view(np.uint32) >> 16

    def number(x: np.ndarray) -> np.ndarray:
        if half:
            return x.astype(np.uint16).view(np.float16).astype(np.float64)
        return (x << 16).astype(np.uint32).view(np.float32).astype(np.float64)

    operands = bits(values)
    exact = [Fraction(a) * Fraction(b) + Fraction(c) for a, b, c in number(operands).T.tolist()]
    for i in range(4):
        memory = np.concatenate([operands[:, LANES * i : LANES * (i + 1)], np.zeros((1, LANES), np.uint32)])
        run(
            f"""ld.global.b16 %rs1, [%rd3]; ld.global.b16 %rs2, [%rd3+128]; ld.global.b16 %rs3, [%rd3+256];
            fma.rn.{kind} %rs4, %rs1, %rs2, %rs3; st.global.b16 [%rd3+384], %rs4;""",
            memory,
        )
        found = number(memory[3])
        for lane in range(LANES):
            wanted = exact[LANES * i + lane]
            if not np.isfinite(found[lane]):
                continue
            error = abs(Fraction(found[lane]) - wanted)
            pattern = int(memory[3][lane])
            for other in (pattern - 1, pattern + 1):
                near = float(number(np.array([other & 0xFFFF], np.uint32))[0])
                if np.isfinite(near):
                    rival = abs(Fraction(near) - wanted)
                    assert error < rival or (error == rival and pattern % 2 == 0), (
                        found[lane],
                        float(wanted),
                    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("bfe.s32 %r5, -16, 4, 8;", 0xFFFFFFFF),
        ("bfe.u32 %r5, 0x12345678, 8, 12;", 0x456),
        ("bfi.b32 %r5, 0xF, 0, 4, 8;", 0xF0),
        ("shl.b32 %r5, 1, 40;", 0),
        ("shr.s32 %r5, -8, 40;", 0xFFFFFFFF),
        ("div.s32 %r5, -7, 2;", 0xFFFFFFFD),
        ("mul.wide.s32 %rd9, -2, 3; cvt.u32.u64 %r5, %rd9;", 0xFFFFFFFA),
        ("cvt.rn.bf16x2.f32 %r5, 0f3F800000, 0f40000000;", 0x3F804000),
        ("cvt.rn.f16x2.f32 %r5, 0f3F800000, 0f40000000;", 0x3C004000),
        ("prmt.b32 %r5, 0x89ABCDEF, 0x11223344, 0xB610;", 0xFF22CDEF),
        ("lop3.b32 %r5, 0x89ABCDEF, 0x12345678, 0x33333333, 0xE4;", 0x01230123 | 0x00044448),
        ("{ .reg .b32 t; mov.b32 t, 7; add.s32 %r5, t, 1; }", 8),
        ("setp.lt.s32 %p1, %r1, 0; selp.b32 %r5, 1, 2, %p1;", 2),
        ("@!%p9 mov.b32 %r5, 9;", 9),
        ("fma.rn.f32 %r5, 0f3F800001, 0f3F800001, 0fBF800002;", 0x28800000),
    ],
)  # fmt: skip
def test_instructions_follow_the_manual(text: str, wanted: int) -> None:
    memory = np.zeros(LANES, np.uint32)
    run(f"mov.pred %p9, 0; {text} st.global.b32 [%rd3], %r5;", memory)
    assert [f"{x:08X}" for x in set(memory.tolist())] == [f"{wanted:08X}"]


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(UnsupportedPtx, match=r"sin\.approx\.f32"):
        kernel("sin.approx.f32 %r5, %r6;")


# Matrix instructions


def fragment_memory(matrix: np.ndarray) -> np.ndarray:
    """16-bit rows as they lie in memory, as words."""
    return np.ascontiguousarray(matrix).view(np.uint32).reshape(-1)


def bf16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("half", [False, True])
def test_mma_multiplies_matrices(half: bool) -> None:
    """A and B through ldmatrix, as the manual has both: C is A B to the last bit that float32 sums have."""
    rng = np.random.default_rng(2)
    a, b = (rng.integers(-64, 64, shape) / 8.0 for shape in ((16, 16), (8, 16)))
    store = (lambda x: x.astype(np.float16).view(np.uint16)) if half else bf16
    memory = np.concatenate([fragment_memory(store(a)), fragment_memory(store(b)), np.zeros(128, np.uint32)])
    kind = "f16" if half else "bf16"
    copy = " ".join(
        f"ld.global.b32 %r5, [%rd3+{128 * i}]; st.shared.b32 [%r4+{128 * i}], %r5;" for i in range(6)
    )
    # lane l gives row l % 16 and the left or right eight columns of A; of B rows l % 8
    body = f"""
        {copy} bar.sync 0;
        and.b32 %r6, %r1, 15; shl.b32 %r6, %r6, 5; bfe.u32 %r7, %r1, 4, 1; shl.b32 %r7, %r7, 4;
        add.s32 %r8, %r6, %r7; add.s32 %r8, %r8, %r2;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r8];
        and.b32 %r6, %r1, 7; shl.b32 %r6, %r6, 5; bfe.u32 %r7, %r1, 3, 1; shl.b32 %r7, %r7, 4;
        add.s32 %r8, %r6, %r7; add.s32 %r8, %r8, %r2;
        ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{%r14, %r15}}, [%r8+512];
        mov.b32 %r20, 0; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0;
        mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%r20,%r21,%r22,%r23}}, {{%r10,%r11,%r12,%r13}},
            {{%r14,%r15}}, {{%r20,%r21,%r22,%r23}};
        shr.u32 %r30, %r1, 2; shl.b32 %r30, %r30, 3; and.b32 %r31, %r1, 3; shl.b32 %r31, %r31, 1;
        add.s32 %r30, %r30, %r31; mul.wide.u32 %rd5, %r30, 4; add.s64 %rd5, %rd5, %rd1;
        st.global.v2.b32 [%rd5+768], {{%r20, %r21}}; st.global.v2.b32 [%rd5+1024], {{%r22, %r23}};
    """
    run(body, memory)
    np.testing.assert_array_equal(memory[192:].view(np.float32).reshape(16, 8), (a @ b.T).astype(np.float32))


def test_ldmatrix_transposes() -> None:
    """Lane l of a transposed load has elements (2 (l % 4), l / 4) and the one below."""
    rows = np.arange(64, dtype=np.uint16).reshape(8, 8)
    memory = np.concatenate([fragment_memory(rows), np.zeros(32, np.uint32)])
    body = """ld.global.b32 %r5, [%rd3]; st.shared.b32 [%r4], %r5; bar.sync 0;
        and.b32 %r6, %r1, 7; shl.b32 %r6, %r6, 4; add.s32 %r6, %r6, %r2;
        ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r7}, [%r6]; st.global.b32 [%rd3+128], %r7;"""
    run(body, memory)
    found = memory[32:].view(np.uint16).reshape(32, 2)
    for lane in range(32):
        assert found[lane].tolist() == rows[2 * (lane % 4) : 2 * (lane % 4) + 2, lane // 4].tolist()


WGMMA = """
    {copy}
    bar.sync 0;
    {fence}
    bfe.u32 %r6, %r2, 4, 14; cvt.u64.u32 %rd6, %r6; or.b64 %rd7, %rd6, {descriptor};
    {values}
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r20,%r21,%r22,%r23}}, {{%r10,%r11,%r12,%r13}},
        %rd7, 0, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    {wait}
    shr.u32 %r30, %r1, 2; shl.b32 %r31, %r1, 1; and.b32 %r31, %r31, 6; bfe.u32 %r32, %r1, 5, 2; and.b32 %r30, %r30, 7;
    shl.b32 %r32, %r32, 4; add.s32 %r30, %r30, %r32; shl.b32 %r30, %r30, 3; add.s32 %r30, %r30, %r31;
    mul.wide.u32 %rd5, %r30, 4; add.s64 %rd5, %rd5, %rd1;
    st.global.v2.b32 [%rd5+4096], {{%r20, %r21}}; st.global.v2.b32 [%rd5+4352], {{%r22, %r23}};
"""


def wgmma(**changed: str) -> str:
    """A = 64 x 16 from registers, all of row r is r + 1; B [8, 16] in shared memory, its rows of 64 bytes swizzled."""
    rows = """shr.u32 %r40, %r1, 2; and.b32 %r40, %r40, 7; bfe.u32 %r41, %r1, 5, 2; shl.b32 %r41, %r41, 4;
        add.s32 %r40, %r40, %r41; add.s32 %r42, %r40, 1; add.s32 %r43, %r40, 9;
        cvt.rn.f32.s32 %r44, %r42; cvt.rn.f32.s32 %r45, %r43;
        cvt.rn.bf16x2.f32 %r10, %r44, %r44; cvt.rn.bf16x2.f32 %r11, %r45, %r45;
        mov.b32 %r12, %r10; mov.b32 %r13, %r11;"""
    parts = {
        "copy": "ld.global.b32 %r5, [%rd3]; st.shared.b32 [%r4], %r5;",
        "fence": "fence.proxy.async.shared::cta;",
        "descriptor": str((2 << 62) | (32 << 32)),
        "values": rows,
        "wait": "wgmma.wait_group.sync.aligned 0;",
    }
    return WGMMA.format(**parts | changed)


def test_wgmma_reads_swizzled_shared_memory() -> None:
    b = np.random.default_rng(3).integers(-8, 8, (8, 32)).astype(np.float64)
    rows = bf16(b).view(np.uint8).reshape(8, 4, 16)
    swizzled = np.empty_like(rows)
    for n in range(8):
        for part in range(4):
            swizzled[n, part ^ (n >> 1 & 3)] = rows[n, part]  # bits 4 and 5 of the address with 7 and 8
    memory = np.zeros(1024 + 512, np.uint32)
    memory[:128] = swizzled.reshape(-1).view(np.uint32)
    run(wgmma(), memory, warps=4)
    wanted = np.arange(1, 65)[:, None] * b[:, :16].sum(1)[None]
    np.testing.assert_array_equal(memory[1024:].view(np.float32).reshape(64, 8), wanted)


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"wait": ""}, "register_held_by_wgmma"),
        ({"wait": "mov.b32 %r10, 0; wgmma.wait_group.sync.aligned 0;"}, "register_held_by_wgmma"),
        ({"wait": "st.shared.b32 [%r4], 5; wgmma.wait_group.sync.aligned 0;"}, "shared_held_by_wgmma"),
        ({"fence": ""}, "proxy_without_fence"),
        (
            {"fence": "fence.proxy.async.shared::cta; wgmma.fence.sync.aligned;", "values": ""},
            "undefined_register",
        ),
    ],
)
def test_mistakes_with_wgmma(changed: dict[str, str], kind: str) -> None:
    assert fault(wgmma(**changed), 1536, warps=4).kind == kind


def test_wgmma_needs_a_fence_after_its_registers() -> None:
    body = wgmma().replace("wgmma.fence.sync.aligned;", "", 1)
    assert fault(body, 1536, warps=4).kind == "wgmma_without_fence"


# Memory


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("st.global.b32 [%rd3+4096], %r1;", "global_outside"),
        ("ld.global.b32 %r5, [%rd3+-4];", "global_outside"),
        ("ld.global.v4.b32 {%r5,%r6,%r7,%r8}, [%rd3];", "global_misaligned"),
        ("st.shared.b32 [%r4+4096], %r1;", "shared_outside"),
        ("st.shared.b16 [%r4+1], %rs1;", "undefined_register"),
        ("mov.u16 %rs1, 1; st.shared.b16 [%r4+1], %rs1;", "shared_misaligned"),
        ("ld.shared.b32 %r5, [%r4];", "shared_unwritten"),
        ("st.global.b32 [%rd3], %r5;", "undefined_register"),
        (
            "add.s32 %r6, %r5, 1; setp.eq.s32 %p1, %r6, 0; @%p1 st.global.b32 [%rd3], 1;",
            "undefined_predicate",
        ),
        ("setp.lt.u32 %p1, %r1, 7; @%p1 bar.sync 0;", "divergent"),
        ("trap;", "trap"),
        ("$L: bra.uni $L;", "endless"),
    ],
)
def test_mistakes_of_one_warp(body: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LIMIT", 1000)
    assert fault(body).kind == kind


def test_what_nobody_wrote_in_global_memory() -> None:
    written = np.ones(4096, np.uint8)
    written[40:44] = 0
    found = fault("ld.global.b32 %r5, [%rd3];", written=written)
    assert found.kind == "global_unwritten" and "lane 10" in str(found)
    run("st.global.b32 [%rd3], 1; ld.global.b32 %r5, [%rd3];", np.zeros(1024, np.uint32), written=written)


SWAP = """st.shared.b32 [%r4], %r1; {sync} xor.b32 %r5, %r4, {other};
    ld.shared.b32 %r6, [%r5]; st.global.b32 [%rd3], %r6;"""


@pytest.mark.parametrize(
    ("sync", "other", "kind"),
    [
        ("", 128, "shared_race"),
        ("bar.warp.sync -1;", 128, "shared_race"),
        ("", 4, "shared_race_in_warp"),
        ("bar.warp.sync -1;", 4, ""),
        ("bar.sync 0;", 128, ""),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_missing_barrier_between_writing_and_reading(sync: str, other: int, kind: str, seed: int) -> None:
    body = SWAP.format(sync=sync, other=other)
    if kind:
        # in the unlucky order the other warp has not written yet, which is found just as well
        assert fault(body, warps=2, seed=seed).kind in (kind, "shared_unwritten")
    else:
        memory = np.zeros(64, np.uint32)
        run(body, memory, warps=2, seed=seed)
        np.testing.assert_array_equal(memory, np.arange(64) ^ (other // 4))


def test_a_missing_barrier_between_reading_and_writing() -> None:
    body = SWAP.format(sync="bar.sync 0;", other=128) + "{sync} st.shared.b32 [%r4], 5;"
    assert fault(body.replace("{sync}", ""), warps=2).kind == "shared_race"
    run(body.replace("{sync}", "bar.sync 0;"), np.zeros(64, np.uint32), warps=2)


COPIES = """
    cp.async.ca.shared.global [%r4], [%rd3], 0x4; cp.async.commit_group;
    cp.async.ca.shared.global [%r4+128], [%rd3+128], 0x4; cp.async.commit_group;
    {wait} {sync}
    ld.shared.b32 %r5, [%r4{which}]; st.global.b32 [%rd3+256], %r5;
"""


@pytest.mark.parametrize(
    ("wait", "which", "kind"),
    [
        ("", "", "shared_in_flight"),
        ("cp.async.wait_group 2;", "", "shared_in_flight"),
        ("cp.async.wait_group 1;", "+128", "shared_in_flight"),
        ("cp.async.wait_group 1;", "", "copies_at_exit"),
        ("cp.async.wait_group 0;", "+128", ""),
    ],
)
def test_copies_that_are_not_waited_for(wait: str, which: str, kind: str) -> None:
    body = COPIES.format(wait=wait, sync="bar.sync 0;", which=which)
    if kind:
        assert fault(body).kind == kind
    else:
        memory = np.arange(96, dtype=np.uint32)
        run(body, memory)
        np.testing.assert_array_equal(memory[64:], np.arange(32, 64))


@pytest.mark.parametrize(
    ("after", "kind"),
    [
        ("cp.async.wait_group 0; bar.sync 0;", ""),
        ("cp.async.wait_group 0;", "shared_race"),
        ("bar.sync 0; cp.async.wait_group 0;", "shared_race"),
    ],
)
def test_a_copy_that_another_warp_reads_needs_a_barrier_after_the_wait(after: str, kind: str) -> None:
    body = f"""cp.async.ca.shared.global [%r4], [%rd3], 0x4; cp.async.commit_group; {after}
        xor.b32 %r5, %r4, 128; ld.shared.b32 %r6, [%r5]; st.global.b32 [%rd3+256], %r6;"""
    if kind:
        assert fault(body, warps=2).kind in (kind, "shared_unwritten", "shared_in_flight")
    else:
        memory = np.arange(128, dtype=np.uint32)
        run(body, memory, warps=2)
        np.testing.assert_array_equal(memory[64:], np.arange(64) ^ 32)


def test_a_buffer_that_is_read_may_not_be_filled_again() -> None:
    copy = "cp.async.ca.shared.global [%r4], [%rd3], 0x4; cp.async.commit_group;"
    body = f"""{copy} cp.async.wait_group 0; bar.sync 0; xor.b32 %r5, %r4, 128; ld.shared.b32 %r6, [%r5];
        {{sync}} {copy} cp.async.wait_group 0;"""
    assert fault(body.format(sync=""), warps=2).kind in ("shared_race", "shared_in_flight")
    run(body.format(sync="bar.sync 0;"), np.zeros(64, np.uint32), warps=2)


# Programs


SPLIT = """
    mov.u32 %r5, %ctaid.x; shl.b32 %r6, %r5, 5; add.s32 %r6, %r6, %r1;
    mul.wide.u32 %rd4, %r6, 4; add.s64 %rd4, %rd4, %rd1;
    add.s32 %r7, %r5, 1; st.global.b32 [%rd4+128], %r7;
    {before}
    setp.eq.s32 %p1, %r1, 0;
    @%p1 {atom}
    @%p1 st.shared.b32 [global_smem], %r8;
    bar.sync 0;
    ld.shared.b32 %r9, [global_smem];
    setp.ne.s32 %p2, %r9, 2;
    @%p2 bra $L_end;
    mov.b32 %r10, 0; mov.b32 %r11, 0;
$L_loop:
    ld.global.b32 %r12, [%rd3+128]; add.s32 %r10, %r10, %r12; add.s64 %rd3, %rd3, 128; add.s32 %r11, %r11, 1;
    setp.lt.s32 %p3, %r11, 3; @%p3 bra $L_loop;
    mul.wide.u32 %rd5, %r1, 4; add.s64 %rd5, %rd1, %rd5; st.global.b32 [%rd5+512], %r10;
$L_end:
"""
ATOM = "atom.global.gpu.acq_rel.add.u32 %r8, [%rd1], 1;"
"""Three programs store a part, the last to arrive adds them: words 0 counter, 32.. parts, 128.. the sum."""


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_the_last_program_adds_the_parts_of_all(order: list[int]) -> None:
    memory = np.zeros(160, np.uint32)
    run(SPLIT.format(before="bar.sync 0;", atom=ATOM), memory, grid=3, order=np.array(order))
    assert memory[0] == 3 and (memory[128:] == 6).all()


def test_parts_read_without_an_atomic_are_a_race() -> None:
    relaxed = "ld.global.b32 %r8, [%rd1]; @%p1 add.s32 %r9, %r8, 1; @%p1 st.global.b32 [%rd1], %r9;"
    assert fault(SPLIT.format(before="bar.sync 0;", atom=relaxed), 160, grid=3).kind == "global_race"


def test_parts_of_other_warps_need_a_barrier_before_the_atomic() -> None:
    body = SPLIT.replace("add.s64 %rd3, %rd3, 128", "add.s64 %rd3, %rd3, 256").replace("+128]", "+256]")
    body = body.replace("shl.b32 %r6, %r5, 5", "shl.b32 %r6, %r5, 6").replace("+512]", "+1024]")
    run(body.format(before="bar.sync 0;", atom=ATOM), np.zeros(320, np.uint32), grid=3, warps=2)
    assert fault(body.format(before="", atom=ATOM), 320, grid=3, warps=2).kind == "global_race"


def test_lanes_part_and_meet_again() -> None:
    body = """setp.lt.u32 %p1, %r1, 10; @%p1 bra $L_few; mov.b32 %r5, 1; bra.uni $L_meet;
    $L_few: mov.b32 %r6, 0; mov.b32 %r5, 0;
    $L_again: add.s32 %r5, %r5, 2; add.s32 %r6, %r6, 1; setp.lt.u32 %p2, %r6, %r1; @%p2 bra $L_again;
    $L_meet: bar.sync 0; st.global.b32 [%rd3], %r5;"""
    memory = np.zeros(32, np.uint32)
    run(body, memory)
    np.testing.assert_array_equal(memory, [2, *range(2, 20, 2), *[1] * 22])
