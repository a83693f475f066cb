"""``ciuic bench tune``: the choice from made-up times, and the table that later runs find."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ciuic_hf.bench import tune as tuner
from ciuic_hf.bench import tune_times
from ciuic_hf.bench.kernels.shapes import WeightShape
from ciuic_hf.bench.kernels.timing import Call, Timing
from ciuic_hf.bench.tune import Tuned, Tuning, table_path, to_table, tune, tune_bucket, write_table
from ciuic_hf.bench.tune_times import Bucket, DeviceTimes, Option, buckets, default_option
from ciuic_hf.cli import bench as cli
from ciuic_hf.cli.main import main
from ciuic_kernels import tuning
from ciuic_kernels.gpus import GPUS
from ciuic_kernels.selection import DEFAULT_RULES, EXPERTS, LINEAR, choose
from tests.bench.conftest import CPU, FACTS, FakeTimer, SilentProgress

H100 = GPUS["H100"]
ALL_BUCKETS = list(buckets())
DECODE = next(b for b in ALL_BUCKETS if b.op == LINEAR and b.size == "large" and b.max_tokens == 8)
MANY = next(b for b in ALL_BUCKETS if b.op == LINEAR and b.size == "large" and b.max_tokens == 128)


def timed(cost: Callable[[Option], float | None]) -> Callable[..., list[tuple[float, ...] | None]]:
    """A timer that knows what every option costs."""

    def times(bucket: Bucket, options: Sequence[Option]) -> list[tuple[float, ...] | None]:
        costs = [cost(option) for option in options]
        return [None if c is None else (c,) * len(bucket.tokens) for c in costs]

    return times


@pytest.mark.parametrize(("gain", "kept"), [(1.0, True), (1.02, True), (1.05, False)])
def test_the_default_stays_unless_something_is_3_percent_faster(gain: float, kept: bool) -> None:
    default = default_option(DECODE, H100, DEFAULT_RULES)
    outcome = tune_bucket(DECODE, default, timed(lambda o: 1.0 if o == default else 1.0 / gain))
    assert (outcome.new == default) == kept


def test_each_knob_is_turned_from_the_best_so_far() -> None:
    target = Option((8, 2, 4), 16)

    def cost(option: Option) -> float:
        assert option.launch is not None
        return 1.0 + 0.2 * sum(
            a != b for a, b in zip((*option.launch, option.programs), (8, 2, 4, 16), strict=True)
        )

    outcome = tune_bucket(DECODE, default_option(DECODE, H100, DEFAULT_RULES), timed(cost))
    assert outcome.new == target and outcome.new_seconds < outcome.old_seconds


def test_decode_then_gemm_can_win_many_tokens_and_is_not_tried_for_few() -> None:
    seen: list[Option] = []

    def cost(option: Option) -> float:
        seen.append(option)
        return 0.5 if option.launch is None else 1.0

    assert tune_bucket(MANY, default_option(MANY, H100, DEFAULT_RULES), timed(cost)).new.launch is None
    seen.clear()
    assert (
        tune_bucket(DECODE, default_option(DECODE, H100, DEFAULT_RULES), timed(cost)).new.launch is not None
    )
    assert all(option.launch is not None for option in seen)


def test_what_cannot_be_launched_is_passed_over() -> None:
    default = default_option(DECODE, H100, DEFAULT_RULES)
    outcome = tune_bucket(DECODE, default, timed(lambda o: 1.0 if o == default else None))
    assert outcome.new == default
    with pytest.raises(RuntimeError, match="could not be timed"):
        tune_bucket(DECODE, default, timed(lambda o: None))


def tuning_of(option: Option) -> Tuning:
    outcomes = [
        Tuned(
            b,
            default_option(b, H100, DEFAULT_RULES),
            option,
            (1e-5,) * len(b.tokens),
            (5e-6,) * len(b.tokens),
        )
        for b in ALL_BUCKETS
    ]
    return Tuning(H100.name, tuning.triton_minor() or "3.6", outcomes)


def test_a_later_run_finds_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    option = Option((8, 2, 3), 16)
    tuned = tuning_of(option)
    path = table_path(tuned.gpu, tuned.triton)
    write_table(tuned, path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    rules = tuning.rules_for(tuned.gpu, tuned.triton)
    tuning.rules_for.cache_clear()
    assert tuning.table_for(tuned.gpu, tuned.triton) == path
    for bucket in ALL_BUCKETS:
        launch = choose(
            bucket.op, bucket.max_tokens, bucket.shape.weights, torch.bfloat16, H100, rules
        ).launch
        assert launch is not None
        assert (launch.block_m, launch.num_warps, launch.num_stages, launch.programs) == (8, 2, 3, 16 * 132)
    assert choose(LINEAR, 4096, DECODE.shape.weights, torch.bfloat16, H100, rules).name == "dense"


def test_a_table_that_could_not_be_read_is_not_left(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="not a table of launch rules"):
        write_table(tuning_of(Option((12, 1, 6), 8)), path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_programs_may_be_left_out(tmp_path: Path) -> None:
    table = to_table(tuning_of(Option((8, 1, 6), 4)))
    rules = table["rules"]
    assert isinstance(rules, list)
    del rules[0]["programs"]
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    read = tuning.read_rules(path)[2]
    assert (read[0].programs, read[1].programs) == (8, 4)
    rules[0]["programs"] = 0
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match="0 programs"):
        tuning.read_rules(path)


def test_every_bucket_stands_for_its_class() -> None:
    from ciuic_kernels.selection import size_class

    assert all(size_class(bucket.shape.weights) == bucket.size for bucket in ALL_BUCKETS)


def test_few_tokens_of_all_operators_come_first() -> None:
    order = [bucket.max_tokens for bucket in ALL_BUCKETS]
    assert order == sorted(order) and {bucket.op for bucket in ALL_BUCKETS[:7]} == {LINEAR, EXPERTS}


SMALL = Bucket(LINEAR, "small", 8, WeightShape("small", 64, 128), (1, 3))
SMALL_EXPERTS = Bucket(EXPERTS, "small", 8, WeightShape("experts", 64, 128, 2, 1), (2,))


class ByCall(FakeTimer):
    """Later calls of a comparison are faster."""

    def __init__(self) -> None:
        super().__init__(lambda place: 1e-5 / (1 + place))
        self.sizes: list[int] = []

    def medians(self, calls: Sequence[Call]) -> list[Timing]:
        self.sizes.append(len(calls))
        return super().medians(calls)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch, interpreted: object) -> None:
    """The interpreter compiles nothing; it has no bfloat16, and takes its time."""
    monkeypatch.setattr(tune_times, "BITS", "grid4_g64")
    monkeypatch.setattr(DeviceTimes, "_compile", lambda self, calls: None)
    right = tune_times.activations
    monkeypatch.setattr(
        tune_times,
        "activations",
        lambda tokens, cols, dtype, device: right(tokens, cols, torch.float16, device),
    )


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("bucket", [SMALL, SMALL_EXPERTS], ids=str)
def test_launches_are_run_and_timed(bucket: Bucket) -> None:
    timer = ByCall()
    times = DeviceTimes(CPU, FACTS, timer)
    options = [Option((8, 1, 6), 8), Option((16, 1, 3), 8), Option((8, 1, 6), 4)]
    assert times(bucket, options) == [(1e-5,) * len(bucket.tokens), (5e-6,) * len(bucket.tokens), (
        pytest.approx(1e-5 / 3),) * len(bucket.tokens)]  # fmt: skip
    assert not times.failed


@pytest.mark.usefixtures("uncompiled")
def test_options_of_one_launch_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two kinds of blocks, four warps become two and 64 tokens 32."""
    timer = ByCall()
    times = DeviceTimes(CPU, FACTS, timer)
    monkeypatch.setattr(tune_times, "compiled_kinds", lambda kinds: (1, 2))
    monkeypatch.setattr(times, "_call", lambda *_: lambda: torch.ones(2, 2))
    monkeypatch.setattr(times, "_unlike_the_first", lambda calls: [""] * len(calls))
    found = times(
        SMALL, [Option((8, 1, 6), 8), Option((64, 4, 4), 8), Option((32, 2, 4), 8), Option((32, 4, 4), 8)]
    )
    assert timer.sizes == [2, 2] and found[1] == found[2] == found[3] != found[0]


@pytest.mark.usefixtures("uncompiled")
def test_an_option_that_gives_other_results_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    times = DeviceTimes(CPU, FACTS, ByCall())
    right = times._call

    def call(bucket: Bucket, operand: Any, tokens: int, option: Option) -> Call:
        made: Any = right(bucket, operand, tokens, option)

        def hole() -> Tensor:
            """One row of the matrix, with a large scale as every strip has some, is left out."""
            out: Tensor = made().clone()
            out[:, out.abs().amax(0).argmax()] = 0
            return out

        return {16: hole, 4: lambda: made() / 0}.get(option.programs, made)

    monkeypatch.setattr(times, "_call", call)
    default = Option((8, 1, 6), 8)
    found = times(SMALL, [default, *(Option((8, 1, 6), programs) for programs in (16, 4, 2))])
    assert [row is None for row in found] == [False, True, True, False]
    assert {text.split(" are off")[0] for text in times.failed.values()} == {"results"}
    assert tune_bucket(SMALL, default, times).new.programs not in (4, 16)


class Scripted:
    """In place of ``DeviceTimes``: what happens at each bucket."""

    def __init__(self, *_: object) -> None:
        self.failed: dict[str, str] = {}

    def __call__(self, bucket: Bucket, options: Sequence[Option]) -> list[tuple[float, ...] | None]:
        if (bucket.op, bucket.size, bucket.max_tokens) == (LINEAR, "small", 16):
            raise RuntimeError("a CUDA error\nmore")
        if (bucket.op, bucket.size, bucket.max_tokens) == (LINEAR, "large", 128):
            raise KeyboardInterrupt
        return [(1.0 if place == 0 else 0.5,) * len(bucket.tokens) for place, _ in enumerate(options)]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(tuner, "DeviceTimes", Scripted)
    monkeypatch.setattr(tuner, "CudaTimer", lambda *args, **named: FakeTimer())
    monkeypatch.setattr(tuner, "device_facts", lambda device: H100)
    monkeypatch.setattr(cli, "_gpu", lambda name, command: CPU)
    monkeypatch.setattr(tuning, "triton_minor", lambda: "3.6")


@pytest.mark.usefixtures("scripted")
def test_what_was_not_reached_keeps_its_default() -> None:
    """A size that failed is not taken over by the rule of the next."""
    found = tune(CPU, SilentProgress())
    reasons = {str(bucket): why for bucket, _, why in found.left}
    assert found.interrupted and reasons["linear, small, up to 16 tokens"] == "RuntimeError: a CUDA error"
    assert (
        reasons["linear, large, up to 128 tokens"]
        == reasons["linear, large, up to 512 tokens"]
        == "interrupted"
    )
    assert len(found.outcomes) + len(found.left) == len(ALL_BUCKETS)
    path = table_path(found.gpu, found.triton)
    write_table(found, path)
    rules = tuning.rules_for(found.gpu, found.triton)
    tuning.rules_for.cache_clear()
    for bucket, default, _ in found.left:
        chosen = choose(
            bucket.op, bucket.max_tokens, bucket.shape.weights, torch.bfloat16, H100, rules
        ).launch
        same = None if chosen is None else (chosen.block_m, chosen.num_warps, chosen.num_stages)
        assert same == default.launch, bucket
    assert any(outcome.new != outcome.old for outcome in found.outcomes)


@pytest.mark.usefixtures("scripted")
def test_the_command_writes_what_inspect_shows(capsys: pytest.CaptureFixture[str]) -> None:
    """From `tune` to `inspect --dispatch`, for a GPU that is not here."""
    assert main(["bench", "tune"]) == 130
    path = table_path(H100.name, "3.6")
    assert path.exists() and str(path.name) in capsys.readouterr().out.replace("\n", "")
    try:
        assert main(["inspect", "--dispatch", "--gpu", "H100", "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["rules"] == str(path)
        tuned = choose(
            LINEAR, 1, DECODE.shape.weights, torch.bfloat16, H100, tuning.read_rules(path)[2]
        ).launch
        assert tuned is not None and (tuned.block_m, tuned.num_warps, tuned.num_stages) != (8, 1, 6)
        (route,) = [
            route
            for name, routes in shown["weights"].items()
            if name.startswith("V3 dense gate_proj")
            for route in routes
            if route["first"] == 1
        ]
        assert f"{tuned.num_stages} stages, {tuned.programs} programs" in route["launch"]
    finally:
        tuning.rules_for.cache_clear()


@pytest.mark.usefixtures("scripted")
def test_no_time_at_all_writes_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tune", "--minutes", "-1"]) == 1
    assert "nothing was tuned" in capsys.readouterr().err
    assert not table_path(H100.name, "3.6").exists()
