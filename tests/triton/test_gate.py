"""The gate itself: machine code is read right, and each rule can fail."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ciuic_kernels.work import ANY, ANY_SPARSE
from tests.triton import budgets
from tests.triton.cases import DENSE, TYPICAL, Case, end_cases, fast_cases, full_cases
from tests.triton.gate import violations
from tests.triton.measurement import Measurement
from tests.triton.sass import Loop, accesses, loops

CASE = Case("linear", 90, "bf16", (TYPICAL,))
GOOD = Loop(8192, 3.2, "HMMA", copies=12, loads=0, wide_loads=0, stores=0, shuffles=0)


def line(text: str) -> str:
    return f"        /*0a40*/                   {text} ;"


def listing(*texts: str) -> str:
    return "\n".join(text if text.startswith(".") else line(text) for text in texts)


def test_reads_a_loop() -> None:
    body = [
        ".L_x_1:",
        "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]",
        "@P0 LDG.E.U16 R3, desc[UR4][R2.64]",
        "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]",
        "STS.128 [R1], R4",
        "SHFL.BFLY PT, R1, R2, 0x1, 0x1f",
        *["HMMA.16816.F32.BF16 R4, R8, R12, R4"] * 32,
        "@P1 BRA `(.L_x_1)",
    ]
    (loop,) = loops(listing("MOV R1, R2", *body, "EXIT"), block_m=8, num_warps=1)
    expected = Loop(8192, round(38 * 32 / 8192, 2), "HMMA", 1, 2, 1, 1, 1)
    assert loop == expected and loop.whole_block


def test_reads_the_innermost_loops_around_mma_only() -> None:
    wait = [".L_x_2:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2", "@!P0 BRA `(.L_x_2)"]
    code = [
        ".L_x_0:",
        ".L_x_1:",
        *wait,
        *["HGMMA.64x64x16.F32.BF16 R4, R8, gdesc[UR4], R4"] * 8,
        "@P1 BRA `(.L_x_1)",
        "@P2 BRA `(.L_x_0)",
    ]
    (loop,) = loops(listing(*code), block_m=64, num_warps=4)
    assert (loop.weights, loop.mma) == (8192, "HGMMA")
    assert loop.per_weight == round(11 * 32 * 4 / 8192, 2)


def test_a_jump_back_from_a_slow_path_is_no_loop() -> None:
    mma = "HMMA.16816.F32.BF16 R4, R8, R12, R4"
    code = [".L_x_1:", *[mma] * 16, ".L_x_2:", *[mma] * 16, "@P1 BRA `(.L_x_1)", "NOP", "BRA `(.L_x_2)"]
    (loop,) = loops(listing(*code), block_m=8, num_warps=1)
    assert loop.weights == 8192


def test_an_unknown_shape_of_mma_is_not_guessed() -> None:
    with pytest.raises(AssertionError, match="shape that is not known"):
        loops(listing(".L_x_1:", "HMMA.1688.F32 R4, R8, R12, R4", "BRA `(.L_x_1)"), block_m=8, num_warps=1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"error": "boom"}, "does not compile: boom"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"spills": 3}, "3 instructions on it"),
        ({"shared": 232_449}, "shared memory"),
        ({"tensor_memory": 513}, "tensor memory"),
        ({"trap": True}, "is a trap"),
        ({"serialised": ["(C7515)"]}, "(C7515)"),
        ({"loops": []}, "0 loops over full blocks"),
        ({"loops": [replace(GOOD, mma="HGMMA")]}, "HMMA expected"),
        ({"loops": [replace(GOOD, copies=0)]}, "not copied ahead"),
        ({"loops": [replace(GOOD, wide_loads=1)]}, "wide loads"),
        ({"loops": [replace(GOOD, stores=3)]}, "3 stores"),
        ({"loops": [replace(GOOD, shuffles=1)]}, "1 shuffles"),
        ({"loops": [GOOD, replace(GOOD, weights=1024)]}, "1 others"),
    ],
)
def test_every_rule_can_fail(change: dict[str, object], said: str) -> None:
    good = Measurement(loops=[GOOD], instructions=1000, registers=80)
    assert violations(CASE, good, "3.8") == []
    (sentence,) = violations(CASE, replace(good, **change), "3.8")
    assert said in sentence


DECODING = Case("dequantize", 90, "bf16", (), DENSE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"LDG.128": 15}, "15 loads of 16 bytes where 16"),
        ({"STG.128": 0, "STG.64": 16}, "0 stores of 16 bytes and 16 others"),
        ({"STG": 1}, "1 others"),
        ({"STS": 8, "LDS": 8}, "16 instructions pass values"),
        ({"SHFL": 1}, "1 instructions pass values"),
    ],
)
def test_decoding_is_wide_and_stays_in_registers(change: dict[str, int], said: str) -> None:
    good = {"LDG": 2, "LDG.U8": 8, "LDG.128": 16, "STG.128": 16}
    assert violations(DECODING, Measurement(accesses=good), "3.7") == []
    (sentence,) = violations(DECODING, Measurement(accesses=good | change), "3.7")
    assert said in sentence


def test_sparse_blocks_and_triton_3_6_may_use_shared_memory() -> None:
    detour = Measurement(accesses={"LDG.128": 16, "STG.128": 16, "STS": 8})
    assert violations(replace(DECODING, kinds=(ANY, ANY_SPARSE)), detour, "3.7") == []
    assert violations(DECODING, detour, "3.6") == []


def test_reads_accesses_of_memory() -> None:
    code = [
        "LDG.E.128.CONSTANT R1, [R2]",
        "LDG.E R1, [R2]",
        "STG.E.U16 [R2], R1",
        "LDS.128 R1, [R2]",
        "FADD R1, R2, R3",
    ]
    assert accesses(code) == {"LDG.128": 1, "LDG": 1, "STG.U16": 1, "LDS": 1}


def test_a_detour_through_shared_memory_is_known_before_3_8() -> None:
    measured = Measurement(loops=[replace(GOOD, stores=32)])
    assert violations(CASE, measured, "3.7") == []
    assert violations(CASE, measured, "3.10") != []


def test_kinds_that_have_no_grid_need_their_loop() -> None:
    assert violations(replace(CASE, kinds=(TYPICAL, ANY)), Measurement(loops=[GOOD]), "3.8")


@pytest.mark.parametrize(
    ("cost", "budget", "said"),
    [
        (3.2, [3.2], ""),
        (3.21, [3.2], "the budget is 3.2"),
        (3.15, [3.2], ""),
        (3.14, [3.2], "keep the gain"),
        (3.2, [3.2, 9.0], "stored are"),
        (3.2, None, "no budget is stored"),
    ],
)
def test_budgets_hold_both_ways(cost: float, budget: list[float] | None, said: str) -> None:
    found = budgets.disagreements(CASE, Measurement(loops=[replace(GOOD, per_weight=cost)]), budget)
    assert bool(found) == bool(said) and all(said in sentence for sentence in found)


def test_selections_contain_each_other() -> None:
    assert set(fast_cases()) | set(end_cases()) <= set(full_cases())
    assert all(Case.from_json(case.to_json()) == case for case in full_cases())
