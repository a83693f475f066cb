"""The order of a run, its time budget, products against peers, and the processes that generate text."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from ciuic_hf.bench.kernels import end_to_end
from ciuic_hf.bench.kernels import run as running
from ciuic_hf.bench.kernels.end_to_end import child_command, run_child
from ciuic_hf.bench.kernels.generate import (
    V2_LITE,
    StepClock,
    _empty_model,
    measure_batch,
    measure_fill,
    measure_model,
    random_model,
)
from ciuic_hf.bench.kernels.operands import random_operand, routing
from ciuic_hf.bench.kernels.peers import Peer, Product
from ciuic_hf.bench.kernels.products import CUBLAS, FORMATS, Format, fitting, measure_shape
from ciuic_hf.bench.kernels.result import Result
from ciuic_hf.bench.kernels.run import FIRST, Bench, Budget, Plan, plans
from ciuic_hf.bench.kernels.shapes import STANDARD, TOKENS, WeightShape
from ciuic_hf.bench.kernels.timing import Ceilings, measure_ceilings
from ciuic_hf.hf.choosing import uniform_choice
from ciuic_hf.hf.config import CiuicConfig
from ciuic_kernels import ops
from ciuic_kernels.packing import decode_tensor
from ciuic_kernels.tolerances import exact_product, product_bound
from tests.bench.conftest import CPU, MACHINE, FakeTimer, SilentProgress

SMALL = WeightShape("small", 70, 200)
EXPERTS = WeightShape("experts", 24, 64, 4, 2)
TWO = (Format(4, "grid4_g64"), Format(4.25, 4.25))
TINY_V2 = V2_LITE | {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "max_position_embeddings": 128,
}  # fmt: skip


def product_of(weight: torch.Tensor) -> Product:
    return lambda x: x @ weight.t()


def broken_quantizer(weight: torch.Tensor) -> Product:
    raise TypeError("unexpected keyword argument")


def broken_kernel(weight: torch.Tensor) -> Product:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    return fail


PEERS = (
    Peer("good", "torch", product_of),
    Peer("bad quantizer", "torch", broken_quantizer),
    Peer("bad kernel", "torch", broken_kernel),
)


def test_every_comparison_has_a_row_and_every_error_is_kept() -> None:
    rows = list(measure_shape(SMALL, TWO, (1, 3), FakeTimer(), CPU, PEERS))
    assert [(row.bits, row.tokens) for row in rows] == [(4, 1), (4, 3), (4.25, 1), (4.25, 3)]
    for row in rows:
        assert set(row.peers) == {CUBLAS, "good"}
        assert row.errors == {
            "bad quantizer": "TypeError: unexpected keyword argument",
            "bad kernel": "RuntimeError: no kernel image",
        }
        assert row.seconds is not None and row.ratio() == pytest.approx(row.peers[CUBLAS] / row.seconds)
        assert row.nbytes == random_operand(SMALL, TWO[int(row.bits > 4)].setting, CPU).packed.nbytes


def test_experts_count_the_bytes_that_are_routed_to() -> None:
    (row,) = measure_shape(EXPERTS, TWO[:1], (1,), FakeTimer(), CPU)
    whole = random_operand(EXPERTS, "grid4_g64", CPU).packed.nbytes
    assert row.nbytes == whole * EXPERTS.routed // EXPERTS.experts
    assert set(row.peers) == {CUBLAS}


def test_random_bytes_are_weights() -> None:
    operand = random_operand(SMALL, 4.25, CPU)
    dense = decode_tensor(operand.packed)
    assert dense.isfinite().all() and 1e-5 < float(dense.std()) < 1e-1
    x = torch.randn(2, 200)
    out = ops.linear(x, *operand.stored, None, 70, 200)
    assert ((out - exact_product(x, dense)).abs() <= product_bound(x, dense)).all()


def test_a_token_goes_to_different_experts() -> None:
    ids = routing(50, EXPERTS, CPU)
    assert ids.shape == (50, 2) and int(ids.min()) >= 0 and int(ids.max()) < 4
    assert (ids[:, 0] != ids[:, 1]).all()


def test_experts_are_scaled_to_the_memory() -> None:
    big = next(shape for shape in STANDARD if shape.experts == 256)
    assert fitting(big, 80 << 30) == big
    assert fitting(big, 16 << 30).experts < 256
    assert fitting(big, 0).experts == big.routed
    assert fitting(SMALL, 0) == SMALL


def test_ceilings_count_both_directions_of_a_copy() -> None:
    assert measure_ceilings(FakeTimer(), CPU, copy_nbytes=1000, side=10) == Ceilings(
        pytest.approx(2e9), pytest.approx(2e9), pytest.approx(1e-6)
    )


def test_the_bar_comes_first_and_nothing_is_left_out() -> None:
    decode, prefill, compared, rest = plans(PEERS, quick=False)
    assert [plan.shape.name for plan in decode] == [plan.shape.name for plan in prefill] == list(FIRST)
    assert sorted(plan.shape.name for plan in [*decode, *rest]) == sorted(shape.name for shape in STANDARD)
    assert all(plan.formats == FORMATS for plan in [*decode, *prefill, *rest])
    assert {tokens for pair in zip(decode, prefill, strict=True) for plan in pair for tokens in plan.tokens} == {
        tokens for plan in rest for tokens in plan.tokens
    } == set(TOKENS)  # fmt: skip
    assert all(plan.peers == PEERS and max(plan.tokens) <= 64 for plan in compared)
    assert plans((), quick=False)[2] == []


class Clock:
    """A second passes each time it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def run_plans(seconds: float) -> Result:
    result, progress, saved = Result(MACHINE), SilentProgress(), list[int]()
    budget = Budget(seconds, Clock())
    bench = Bench(result, CPU, FakeTimer(), progress, budget, lambda r: saved.append(len(r.products)))
    running._run_plans(bench, [Plan(SMALL, TWO, (1, 2)), Plan(EXPERTS, TWO, (1, 2))])
    assert len(progress.steps) == len(result.products)
    assert not result.products or saved[-1] == len(result.products)
    return result


def test_what_has_no_time_left_is_said() -> None:
    whole, half, none = run_plans(100), run_plans(4), run_plans(0)
    assert (len(whole.products), whole.not_measured) == (8, [])
    assert 0 < len(half.products) < 4
    assert half.not_measured == [
        f"small at 1 to 2 tokens: no time left after {len(half.products)} of 4 rows",
        "experts at 1 to 2 tokens: no time left",
    ]
    assert (none.products, none.not_measured) == (
        [],
        ["small at 1 to 2 tokens: no time left", "experts at 1 to 2 tokens: no time left"],
    )


def test_out_of_memory_leaves_out_one_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(shape: WeightShape, *rest: object) -> object:
        if shape == SMALL:
            raise torch.OutOfMemoryError("no memory")
        return measure_shape(shape, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(running, "measure_shape", measure)
    result = run_plans(100)
    assert result.not_measured == ["small at 1 to 2 tokens: out of memory after 0 of 4 rows"]
    assert len(result.products) == 4


CHILD = """
import json, sys, time
out = open(sys.argv[sys.argv.index("--out") + 1], "a")
out.write(json.dumps({"batch": 1}) + "\\n"); out.flush()
"""


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ("", ""),
        ("time.sleep(60)", "was ended after 3 seconds"),
        ("raise ValueError('what went wrong')", "ended with status 1: ValueError: what went wrong"),
    ],
)
def test_a_child_is_ended_in_time_and_its_lines_are_kept(then: str, said: str) -> None:
    started, lines = time.perf_counter(), list[dict[str, object]]()
    trouble = run_child([sys.executable, "-c", CHILD + then], 3, lines.append)
    assert (lines, trouble) == ([{"batch": 1}], said)
    assert time.perf_counter() - started < 20


def test_lines_come_as_they_are_written_and_half_a_line_waits(tmp_path: Path) -> None:
    path, lines = tmp_path / "lines", list[dict[str, object]]()
    assert end_to_end._take_lines(path, 0, lines.append) == 0
    path.write_text('{"batch": 1}\n{"bat')
    assert end_to_end._take_lines(path, 0, lines.append) == 1
    path.write_text('{"batch": 1}\n{"batch": 8}\n')
    assert end_to_end._take_lines(path, 1, lines.append) == 2
    assert lines == [{"batch": 1}, {"batch": 8}]


def test_a_child_ends_with_an_interrupted_run() -> None:
    children: list[int] = []

    def interrupt(line: dict[str, int]) -> None:
        children.append(line["pid"])
        raise KeyboardInterrupt

    script = CHILD.replace('{"batch": 1}', '{"pid": __import__("os").getpid()}') + "time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        run_child([sys.executable, "-c", script], 50, interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(children[0], 0)


def test_the_command_of_a_child() -> None:
    assert child_command(4.25, torch.device("cuda:0"), 99.6)[1:] == [
        "-m", "ciuic_hf.bench.kernels.generate", "--device", "cuda:0", "--seconds", "100", "--bits", "4.25",
    ]  # fmt: skip
    assert "--bits" not in child_command(None, torch.device("cuda:0"), 5)


def test_a_step_is_timed_over_the_second_half() -> None:
    clock, scores = StepClock(4), torch.zeros(1, 3)
    for _ in range(4):
        assert clock(torch.zeros(1, 1), scores) is scores
    assert sorted(clock.times) == [2, 4]
    assert clock.seconds == pytest.approx((clock.times[4] - clock.times[2]) / 2)


@pytest.mark.parametrize("bits", [4.25, None])
def test_a_random_model_generates(bits: float | None) -> None:
    with torch.inference_mode():
        model = random_model(TINY_V2, bits, CPU)
        lines = list(measure_model(model, 60, ((2, False),), new_tokens=4))
    (line,) = lines
    assert line["batch"] == 2 and line["tokens_per_second"] > 0 and not line["graphs"]
    assert json.loads(json.dumps(line)) == line


def test_a_run_that_fails_is_a_line_and_the_next_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from ciuic_hf.bench.kernels import generate

    def fail_at_one(model: object, batch: int, graphs: bool, new_tokens: int) -> dict[str, object]:
        if batch == 1:
            raise RuntimeError("out of tricks\nand more")
        return {"batch": batch, "graphs": graphs}

    monkeypatch.setattr(generate, "measure_batch", fail_at_one)
    lines = list(measure_model(None, 60, ((1, True), (8, False))))
    assert lines == [
        {"batch": 1, "graphs": True, "error": "RuntimeError: out of tricks"},
        {"batch": 8, "graphs": False},
    ]
    assert list(measure_model(None, -1, ((8, False),))) == []


def test_memory_is_measured_after_the_first_two_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from ciuic_hf.bench.kernels import generate

    monkeypatch.setattr(
        generate, "measure_batch", lambda model, batch, graphs, new: {"batch": batch, "graphs": graphs}
    )
    lines = list(
        measure_model(None, 60, ((1, True), (1, False), (8, False)), fill=lambda model: {"context": 7})
    )
    assert [line.get("context", line.get("batch")) for line in lines] == [1, 1, 7, 8]


def test_what_the_planner_says_of_the_model_that_generates() -> None:
    """Without a GPU there is no peak; weights and tables that the prediction counts are those of the model."""
    with torch.inference_mode():
        model = random_model(TINY_V2, 4.25, CPU)
        line = measure_fill(model, TINY_V2, 4.25, context=64, batch=2)
    assert (line["peak_nbytes"], line["tokens"]) == (None, 128)
    config = CiuicConfig(bits=4.25, policy="uniform")
    choice = uniform_choice(_empty_model(TINY_V2, "deepseek_v2"), config, torch.bfloat16, 64, 2)
    assert choice.weights_nbytes == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert choice.beside is not None and line["predicted_nbytes"] == sum(choice.budget().values())
    assert line["predicted_nbytes"] > choice.weights_nbytes + choice.beside.total


def test_peak_memory_is_not_invented(tmp_path: Path) -> None:
    with torch.inference_mode():
        model = random_model(TINY_V2, None, CPU)
        assert measure_batch(model, 1, graphs=False, new_tokens=2)["peak_nbytes"] is None
