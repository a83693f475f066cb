"""The gate of ``ciuic bench kernels``: green for right kernels, red for every kind of wrong one."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ciuic_hf.bench.kernels import gate, huge, workers
from ciuic_hf.bench.kernels.gate import ALL, FULL, SEVERAL, SMALL, Case, Sizes, check_case, gate_cases
from ciuic_hf.bench.kernels.workers import run_gate
from ciuic_kernels import all_codecs, ops
from ciuic_kernels.codecs.grid import GRIDS
from ciuic_kernels.selection import DEFAULT_RULES, LINEAR, MAX_TOKENS
from tests.bench.conftest import CPU

HALF = torch.float16
TINY = Sizes(
    mixed=("grid4_g64",),
    shapes=((64, 128),),
    mixed_shapes=((5, 40),),
    experts=((2, 5, 40),),
    mixed_experts=(),
    tokens=(3,),
    siblings=((5, 70, 40),),
    sibling_tokens=(3,),
    pairs=((1, 2), (33, 2)),
    ids=2,
    cache_bits=(4,),
    pages=((64, 64), (20, 64)),
    queries=((3, 2),),
    heads=((1, 16, 16),),
    latents=((1, 24, 16),),
)
OPERATORS = ("linear", "experts", "dequantize", "embedding")


def test_it_covers_every_launch_codec_and_dtype() -> None:
    cases = list(gate_cases((torch.bfloat16, torch.float16)))
    assert len(set(cases)) == len(cases)
    for codec in [ALL, *(grid.name for grid in GRIDS.values()), "zero", "raw_bf16", "raw_fp16"]:
        for dtype in (torch.bfloat16, torch.float16):
            name = SEVERAL if (codec, dtype) == (ALL, torch.float16) else codec
            assert {c.operator for c in cases if c.codec == name and c.dtype == dtype} >= set(OPERATORS)
    for dtype in (torch.bfloat16, torch.float16):
        found = {c.operator for c in cases if c.dtype == dtype}
        assert found == {*OPERATORS, "linears", "inputs", "heads", "latents"}
    everywhere = [c for c in cases if c.operator == "linear" and c.codec == ALL and c.shape == FULL.shapes[0]]
    assert sorted(tokens for c in everywhere for tokens in c.sizes) == sorted(FULL.tokens)
    assert {pair for c in cases if c.operator == "experts" for pair in c.sizes} == set(FULL.pairs)
    limits = [0, *(rule.max_tokens for rule in DEFAULT_RULES if rule.op == LINEAR)]
    for low, high in itertools.pairwise(limits):
        assert any(low < tokens <= min(high, MAX_TOKENS) for tokens in FULL.tokens), (low, high)
    small = list(gate_cases((torch.bfloat16,), SMALL))
    assert {c.operator for c in small} == {c.operator for c in cases} and len(small) < 40
    assert len(gate.sampled_codecs()) <= 45
    assert {c.name.rstrip("0123456789") for c in gate.sampled_codecs()} == {
        c.name.rstrip("0123456789") for c in all_codecs()
    }


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "codec", ["grid4_g64", "zero", "4-bit cache", pytest.param(ALL, marks=pytest.mark.slow)]
)
def test_the_kernels_pass(codec: str) -> None:
    cases = [case for case in gate_cases((HALF,), TINY) if case.codec == codec]
    assert {case.operator for case in cases} >= {"linear": set(OPERATORS)}.get(
        cases[0].operator, {"heads", "latents"}
    )
    done: list[str] = []
    assert run_gate(cases, CPU, done.append, workers=0, sizes=TINY) == []
    assert done == [str(case) for case in cases]


def wrong_by_a_bit(out: Tensor) -> Tensor:
    out.view(-1)[-1] += 0.05
    return out


def hole(out: Tensor) -> Tensor:
    return out.new_empty(out.shape).copy_(out).index_fill_(0, torch.tensor([0]), float("nan"))


def other_dtype(out: Tensor) -> Tensor:
    return out.float()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("fault", "said"),
    [(wrong_by_a_bit, "more than the bound"), (hole, "NaN"), (other_dtype, "torch.float32")],
)
@pytest.mark.parametrize("operator", ["linear", "experts"])
def test_a_wrong_product_is_red(
    fault: Callable[[Tensor], Tensor], said: str, operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"linear": "linear", "experts": "expert_linear"}[operator]
    right = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *args: fault(right(*args).clone()))
    shape = (5, 40) if operator == "linear" else TINY.experts[0]
    codec = "zero" if fault is other_dtype else "grid4_g64"
    sizes = TINY.tokens if operator == "linear" else TINY.pairs
    failures = check_case(Case(operator, codec, shape, HALF, sizes), CPU, TINY)
    assert failures and all(said in failure.what for failure in failures)
    assert all(failure.case.startswith(f"{operator}, ") for failure in failures)


@pytest.mark.usefixtures("interpreted")
def test_runs_that_differ_are_red(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = ops.linear, [0]

    def unsteady(*args: object) -> Tensor:
        calls[0] += 1
        out = right(*args).clone()
        return out + 2.0**-14 * (calls[0] % 2)

    monkeypatch.setattr(ops, "linear", unsteady)
    failures = check_case(Case("linear", "grid8_g64", (5, 40), HALF, (3,)), CPU, TINY)
    assert failures and all("two runs differ" in failure.what for failure in failures)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("operator", ["dequantize", "embedding"])
def test_a_wrong_value_is_red(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(ops, operator)
    monkeypatch.setattr(ops, operator, lambda *args, **named: right(*args, **named) * 1.001)
    assert check_case(Case(operator, "grid6_g64", (5, 40), HALF), CPU, TINY)


def test_what_a_case_raises_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(ops, "linear", broken)
    (failure,) = check_case(Case("linear", "grid4_g64", (64, 128), HALF, (3,)), CPU, TINY)
    assert "raised RuntimeError: CUDA error: an illegal memory access" in failure.what


@pytest.mark.slow
def test_processes_find_what_one_finds() -> None:
    """On a CPU the gate holds for the compiled kernels as well; an unknown operator cannot be checked."""
    cases = [
        Case("linear", "grid4_g64", (64, 128), HALF, (3,)),
        Case("nothing", "grid4_g64", (64, 128), HALF),
    ]
    failures = run_gate(cases, CPU, workers=2, sizes=TINY)
    assert failures == run_gate(cases, CPU, workers=0, sizes=TINY)
    assert [failure.case for failure in failures] == [str(cases[1])]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("operator", ["heads", "latents"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda out, lse: (out, lse + 0.5), "log-sum-exp: off by"),
        (lambda out, lse: (1.05 * out, lse), "of their norm"),
        (lambda out, lse: (torch.where(out == out.max(), torch.nan, out), lse), "NaN"),
    ],
)
def test_wrong_attention_is_red(
    operator: str, wrong: Callable[..., Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference, with an error."""
    right = ops.attend_packed
    case = next(case for case in gate_cases((HALF,), TINY) if case.operator == operator)
    assert check_case(case, CPU, TINY) == []
    monkeypatch.setattr(ops, "attend_packed", lambda *args: wrong(*right(*args)))
    failures = check_case(case, CPU, TINY)
    assert any(said in f"{failure.case}: {failure.what}" for failure in failures), failures


@pytest.mark.usefixtures("interpreted")
def test_siblings_that_are_mixed_up_are_red(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.linears
    monkeypatch.setattr(ops, "linears", lambda *args: right(*args)[::-1])
    assert check_case(Case("linears", "grid4_g64", (70, 70, 40), HALF, (3,)), CPU, TINY)


@pytest.mark.usefixtures("interpreted")
def test_inputs_that_are_not_refused_are_red(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.linear

    def lax(x: Tensor, *rest: Any) -> Tensor:
        return right(torch.zeros(2, 40, dtype=HALF) if x.shape[-1] == 39 else x, *rest)

    monkeypatch.setattr(ops, "linear", lax)
    (failure,) = check_case(Case("inputs", "grid4_g64", (5, 40), HALF), CPU, TINY)
    assert failure == gate.Failure("inputs, grid4_g64, 5 x 40, float16, one column too few", "is not refused")


def scripted(case: Case, device: torch.device, sizes: Sizes) -> list[gate.Failure]:
    """In a worker: what the codec of a case says."""
    if case.codec == "dies":
        os._exit(1)
    if case.codec == "hangs":
        time.sleep(600)
    return [gate.Failure(str(case), "is wrong")] if case.codec in ("wrong", "breaks") else []


def breaking(case: Case, device: torch.device, sizes: Sizes) -> list[gate.Failure]:
    """A worker whose context is gone after a case that breaks."""
    if workers._lost:
        raise workers.LostError(workers._lost)
    if case.codec == "breaks":
        workers._lost = str(case)
    return scripted(case, device, sizes)


def scripted_cases(*codecs: str) -> list[Case]:
    return [Case("linear", codec, (place, 1), HALF) for place, codec in enumerate(codecs)]


@pytest.mark.slow
def test_a_lost_context_costs_its_own_case_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_check", breaking)
    cases = scripted_cases("fine", "breaks", *["fine"] * 6, "wrong", "breaks", "fine")
    done: list[str] = []
    failures = run_gate(cases, CPU, done.append, workers=2)
    assert [failure.case for failure in failures] == [str(cases[place]) for place in (1, 8, 9)]
    assert sorted(done) == sorted(map(str, cases))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_a_worker_that_dies_or_hangs_ends_the_gate_red(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_check", scripted)
    monkeypatch.setattr(workers, "STALL_SECONDS", 20.0)
    cases = scripted_cases("fine", fault)
    failures = run_gate(cases, CPU, workers=1)
    assert str(cases[1]) in [failure.case for failure in failures]
    assert "could not be run" in failures[-1].what or "no result in 20 seconds" in failures[-1].what
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_the_large_part_on_small_parameters() -> None:
    assert list(huge.check_huge(CPU, HALF, matrix=(192, 128), experts=(2, 64, 128), tokens=9)) == []


def test_the_large_parameters_are_large() -> None:
    for shape in (huge.MATRIX, huge.EXPERTS):
        assert torch.Size(shape).numel() > 2**31
        last = torch.Size(shape[-2:]).numel() if len(shape) == 3 else 64 * shape[-1]
        assert torch.Size(shape).numel() - last > 2**31 - 2**25  # also what is checked begins about there
    assert huge.TOKENS * huge.ROUTED * huge.EXPERTS[1] > 2**31 > huge.TOKENS * huge.EXPERTS[2]
