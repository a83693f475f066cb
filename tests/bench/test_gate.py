"""The gate of ``ciuic bench kernels``: green for right kernels, red for every kind of wrong one."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ciuic_hf.bench.kernels import gate, huge
from ciuic_hf.bench.kernels.gate import ALL, FULL, Case, Sizes, check_case, gate_cases, run_gate
from ciuic_kernels import all_codecs, ops
from ciuic_kernels.codecs.grid import GRIDS
from ciuic_kernels.selection import DEFAULT_RULES, LINEAR, MAX_TOKENS
from tests.bench.conftest import CPU

HALF = torch.float16
TINY = Sizes(
    shapes=((64, 128),),
    mixed_shapes=((5, 40),),
    experts=((2, 5, 40),),
    mixed_experts=(),
    tokens=(3,),
    pairs=((1, 2),),
    ids=2,
)
OPERATORS = ("linear", "experts", "dequantize", "embedding")


def test_it_covers_every_launch_codec_and_dtype() -> None:
    cases = list(gate_cases((torch.bfloat16, torch.float16)))
    assert len(set(cases)) == len(cases)
    for codec in [ALL, *(grid.name for grid in GRIDS.values()), "zero", "raw_bf16", "raw_fp16"]:
        for dtype in (torch.bfloat16, torch.float16):
            assert {c.operator for c in cases if c.codec == codec and c.dtype == dtype} == set(OPERATORS)
    limits = [0, *(rule.max_tokens for rule in DEFAULT_RULES if rule.op == LINEAR)]
    for low, high in itertools.pairwise(limits):
        assert any(low < tokens <= min(high, MAX_TOKENS) for tokens in FULL.tokens), (low, high)
    assert len(gate.sampled_codecs()) <= 45
    assert {c.name.rstrip("0123456789") for c in gate.sampled_codecs()} == {
        c.name.rstrip("0123456789") for c in all_codecs()
    }


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("codec", ["grid4_g64", "zero", pytest.param(ALL, marks=pytest.mark.slow)])
def test_the_kernels_pass(codec: str) -> None:
    cases = [case for case in gate_cases((HALF,), TINY) if case.codec == codec]
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
    failures = check_case(
        Case(operator, "zero" if fault is other_dtype else "grid4_g64", shape, HALF), CPU, TINY
    )
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
    failures = check_case(Case("linear", "grid8_g64", (5, 40), HALF), CPU, TINY)
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
    (failure,) = check_case(Case("linear", "grid4_g64", (64, 128), HALF), CPU, TINY)
    assert "raised RuntimeError: CUDA error: an illegal memory access" in failure.what


@pytest.mark.slow
def test_processes_find_what_one_finds() -> None:
    """On a CPU the gate holds for the compiled kernels as well; an unknown operator cannot be checked."""
    cases = [Case("linear", "grid4_g64", (64, 128), HALF), Case("nothing", "grid4_g64", (64, 128), HALF)]
    failures = run_gate(cases, CPU, workers=2, sizes=TINY)
    assert failures == run_gate(cases, CPU, workers=0, sizes=TINY)
    assert [failure.case for failure in failures] == [str(cases[1])]


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_the_large_part_on_small_parameters() -> None:
    assert list(huge.check_huge(CPU, HALF, matrix=(192, 128), experts=(2, 64, 128))) == []


def test_the_large_parameters_are_large() -> None:
    for shape in (huge.MATRIX, huge.EXPERTS):
        assert torch.Size(shape).numel() > 2**31
        last = torch.Size(shape[-2:]).numel() if len(shape) == 3 else 64 * shape[-1]
        assert torch.Size(shape).numel() - last > 2**31 - 2**25  # also what is checked begins about there
