"""``ciuic bench tune``: the choice from made-up times, and the table that later runs find."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from ciuic_hf.bench.tune import (
    Bucket,
    Option,
    Tuned,
    Tuning,
    buckets,
    default_option,
    table_path,
    to_table,
    tune_bucket,
    write_table,
)
from ciuic_kernels import tuning
from ciuic_kernels.gpus import GPUS
from ciuic_kernels.selection import DEFAULT_RULES, LINEAR, choose

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
