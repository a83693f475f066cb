"""What a compiled kernel must be like; each rule that it breaks is a sentence."""

from __future__ import annotations

from collections.abc import Iterator

from ciuic_kernels.work import ANY, ANY_SPARSE
from tests.triton.cases import Case
from tests.triton.measurement import Measurement
from tests.triton.sass import BLOCK_WEIGHTS, Loop

SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}
"""Bytes of shared memory of one program (CUDA programming guide, compute capabilities)."""

TENSOR_COLUMNS = 512
MAX_STORES = 2
DIRECT_SINCE = (3, 8)
"""Triton 3.6 and 3.7 take the operands of decode loops through shared memory once more: 32 stores a block."""

IN_PLACE_SINCE = (3, 7)
"""Triton 3.6 passes the scale bytes of a block that is decoded through shared memory, 1 KB."""


def violations(case: Case, measured: Measurement, triton: str) -> list[str]:
    """The rules that a kernel breaks.

    Args:
        triton: minor version, ``3.8``.
    """
    if measured.error:
        return [f"does not compile: {measured.error}"]
    found = list(_of_kernel(case, measured))
    if case.is_attention:
        found += _of_attention(case, measured)
    elif case.kernel == "dequantize":
        found += _of_decoding(case, measured, tuple(map(int, triton.split("."))))
    elif case.kernel != "embedding":
        found += _of_loops(case, measured, tuple(map(int, triton.split("."))))
    return found


def _of_kernel(case: Case, measured: Measurement) -> Iterator[str]:
    if measured.stack or measured.spills:
        inside = sum(loop.spills for loop in measured.loops)
        yield f"spills: {measured.stack} bytes of stack, {measured.spills} instructions on it, {inside} in the loops"
    if measured.shared > SHARED_LIMIT[case.arch]:
        yield f"{measured.shared} bytes of shared memory, sm_{case.arch} has {SHARED_LIMIT[case.arch]}"
    if measured.tensor_memory > TENSOR_COLUMNS:
        yield f"{measured.tensor_memory} columns of tensor memory, there are {TENSOR_COLUMNS}"
    if measured.trap:
        yield "the PTX is a trap: the compiler gave up without saying so"
    if measured.serialised:
        yield f"matrix instructions wait for each other: ptxas says {', '.join(measured.serialised)}"


def _of_attention(case: Case, measured: Measurement) -> Iterator[str]:
    """One loop over tiles; decoded codes go through shared memory, as both products want another layout of them."""
    if len(measured.loops) != 1:
        yield f"{len(measured.loops)} loops with matrix instructions where one over tiles was expected"
    for loop in measured.loops:
        if loop.mma != "HMMA":
            yield f"multiplies with {loop.mma}, HMMA expected"
        if not loop.copies:
            yield "packed codes are not copied ahead: no LDGSTS of 16 bytes in the loop"
        if loop.wide_loads:
            yield f"{loop.wide_loads} wide loads wait for global memory inside the loop"


def _of_decoding(case: Case, measured: Measurement, triton: tuple[int, ...]) -> Iterator[str]:
    """Full blocks of a grid are read and written in pieces of 16 bytes, from the registers that decoded them."""
    pieces = BLOCK_WEIGHTS // (8 * 32 * case.num_warps)  # of 8 weights, in a thread
    wide = measured.accesses.get("LDG.128", 0)
    if wide < 2 * pieces:
        yield f"{wide} loads of 16 bytes where {2 * pieces} of two planes were expected"
    wide = measured.accesses.get("STG.128", 0)
    narrow = sum(count for name, count in measured.accesses.items() if name.startswith("STG")) - wide
    if wide < pieces or narrow:
        yield f"{wide} stores of 16 bytes and {narrow} others where {pieces} of 16 were expected"
    shared = sum(measured.accesses.get(name, 0) for name in ("STS", "LDS", "LDSM", "SHFL"))
    if shared and ANY_SPARSE not in case.kinds and triton >= IN_PLACE_SINCE:
        yield f"{shared} instructions pass values between threads: a layout is converted"


def _of_loops(case: Case, measured: Measurement, triton: tuple[int, ...]) -> Iterator[str]:
    grids = [kind for kind in case.kinds if kind != ANY]
    blocks = [loop for loop in measured.loops if loop.whole_block]
    others = [loop for loop in measured.loops if not loop.whole_block]
    if len(blocks) != len(grids) or bool(others) != (ANY in case.kinds):
        yield (
            f"{len(blocks)} loops over full blocks and {len(others)} others where {len(grids)} kinds "
            f"{'and any block' if ANY in case.kinds else ''} were expected"
        )
    for loop in blocks:
        yield from _of_loop(case, loop, triton)


def _of_loop(case: Case, loop: Loop, triton: tuple[int, ...]) -> Iterator[str]:
    wanted = expected_mma(case)
    if loop.mma != wanted:
        yield f"multiplies with {loop.mma}, {wanted} expected"
    if not loop.copies:
        yield "weights are not copied ahead: no LDGSTS of 16 bytes in the loop"
    if loop.wide_loads:
        yield f"{loop.wide_loads} wide loads wait for global memory inside the loop"
    if loop.mma == "UTCHMMA" or triton < DIRECT_SINCE:
        return
    if loop.stores > MAX_STORES:
        yield f"{loop.stores} stores to shared memory in the loop: operands take a detour"
    if loop.shuffles:
        yield f"{loop.shuffles} shuffles in the loop: a layout is converted"


def expected_mma(case: Case) -> str:
    """The matrix instruction of an architecture; those of a whole warp group need four warps."""
    if case.num_warps < 4:
        return "HMMA"
    return {90: "HGMMA", 100: "UTCHMMA"}.get(case.arch, "HMMA")
