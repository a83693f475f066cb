"""What ``ciuic bench tune`` tries, for which sizes, and how long it takes on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ciuic_hf.bench.kernels.operands import Operand, activations, random_operand, routing
from ciuic_hf.bench.kernels.shapes import WeightShape
from ciuic_hf.bench.kernels.timing import Call, Timer, Timing, said_by
from ciuic_hf.bench.kernels.workers import processors
from ciuic_kernels.device import DeviceFacts
from ciuic_kernels.format import ceil_div
from ciuic_kernels.ops._products import dense_product
from ciuic_kernels.selection import EXPERTS, LINEAR, Launch, Rule, choose
from ciuic_kernels.work import compiled_kinds

BITS = 4.25
MOST_OFF = 0.06
"""Standard deviations of a result by which another launch may differ from the default's: roundings to bfloat16 are
below a hundredth, a block of large scales that is left out or read twice is more than a tenth."""


@dataclass(frozen=True)
class Option:
    """A launch to try; None is decode-then-GEMM."""

    launch: tuple[int, int, int] | None
    programs: int

    def __str__(self) -> str:
        if self.launch is None:
            return "decode, then GEMM"
        tile, warps, stages = self.launch
        return f"{tile} tokens, {warps} warps, {stages} stages, {self.programs} programs"


@dataclass(frozen=True)
class Bucket:
    """Sizes that share a rule.

    Attributes:
        max_tokens: of the rule: rows of x, or rows per expert.
        shape: the weight that stands for its class of sizes.
        tokens: what is timed, for experts routed rows; their times are weighed equally.
    """

    op: str
    size: str
    max_tokens: int
    shape: WeightShape
    tokens: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.op}, {self.size}, up to {self.max_tokens} tokens"


LINEAR_SHAPES = {
    "small": WeightShape("small matrix", 4096, 2048),
    "medium": WeightShape("V3 shared gate_up", 4096, 7168),
    "large": WeightShape("V3 dense gate_proj", 18432, 7168),
}
EXPERT_SHAPES = {
    "small": WeightShape("V2-Lite experts gate_up", 2816, 2048, 64, 6),
    "medium": WeightShape("V3 experts gate_up", 4096, 7168, 64, 8),
}
LINEAR_BUCKETS = (
    (8, (1, 8)),
    (16, (16,)),
    (32, (32,)),
    (64, (64,)),
    (128, (128,)),
    (256, (256,)),
    (512, (512,)),
)
EXPERT_BUCKETS = ((1, (8, 64)), (8, (512,)), (16, (1024,)), (32, (2048,)), (128, (8192,)))
"""``(largest number, what is timed)``: rows of x; for experts, rows of one of 64 experts, and of all."""


def buckets() -> list[Bucket]:
    """What is tuned, few tokens of all operators first; other sizes keep the default rules."""
    found = [
        Bucket(op, size, max_tokens, shape, tokens)
        for op, shapes, ranges in (
            (LINEAR, LINEAR_SHAPES, LINEAR_BUCKETS),
            (EXPERTS, EXPERT_SHAPES, EXPERT_BUCKETS),
        )
        for size, shape in shapes.items()
        for max_tokens, tokens in ranges
    ]
    return sorted(found, key=lambda bucket: bucket.max_tokens)


def default_option(bucket: Bucket, facts: DeviceFacts, rules: Sequence[Rule]) -> Option:
    """What these rules run for a bucket."""
    choice = choose(bucket.op, bucket.max_tokens, bucket.shape.weights, torch.bfloat16, facts, rules)
    if choice.launch is None:
        return Option(None, 8)
    launch = choice.launch
    return Option(
        (launch.block_m, launch.num_warps, launch.num_stages), launch.programs // max(1, facts.processors)
    )


class DeviceTimes:
    """``TimeOptions`` on a GPU; keeps the compressed weights of all shapes, about a gigabyte.

    Attributes:
        failed: options that could not be launched or gave other results, with the reason.
    """

    def __init__(self, device: torch.device, facts: DeviceFacts, timer: Timer) -> None:
        self.device, self.facts, self.timer = device, facts, timer
        self.failed: dict[str, str] = {}
        self._operands: dict[WeightShape, Operand] = {}

    def __call__(self, bucket: Bucket, options: Sequence[Option]) -> list[tuple[float, ...] | None]:
        """Options that come down to one launch for these kinds of blocks are timed once."""
        operand = self._of(bucket.shape)
        same = [self._launched(option, operand) for option in options]
        distinct = [same.index(launch) for launch in dict.fromkeys(same)]
        columns: list[list[float | None]] = []
        for tokens in bucket.tokens:
            calls = [self._call(bucket, operand, tokens, options[place]) for place in distinct]
            with torch.inference_mode():
                self._compile(calls)
                errors = self._unlike_the_first(calls)
                right = [call for call, error in zip(calls, errors, strict=True) if not error]
                timings = iter(self.timer.medians(right))
            times: dict[Launch | None, float | None] = {}
            for place, error in zip(distinct, errors, strict=True):
                timing = Timing(None, error) if error else next(timings)
                times[same[place]] = timing.seconds
                if timing.error:
                    self.failed[f"{options[place]}, {bucket}"] = timing.error
            columns.append([times[launch] for launch in same])
        rows = list(zip(*columns, strict=True))
        return [None if None in row else tuple(t for t in row if t is not None) for row in rows]

    def _launched(self, option: Option, operand: Operand) -> Launch | None:
        launch = self._launch(option)
        return launch and launch.of_kinds(len(compiled_kinds(tuple(operand.derived.kinds))))

    def _launch(self, option: Option) -> Launch | None:
        if option.launch is None:
            return None
        return Launch(*option.launch, programs=option.programs * self.facts.processors)

    def _compile(self, calls: Sequence[Call]) -> None:
        """Compile side by side what the calls start; what does not compile says so where it is run."""
        from ciuic_kernels.triton._launch import compiling  # imports Triton

        with compiling(processors()):
            for call in calls:
                call()

    def _unlike_the_first(self, calls: Sequence[Call]) -> list[str]:
        """For each call what is wrong with it, measured by the results of the first, which are the default's."""
        expected, errors = None, []
        for call in calls:
            try:
                found = call()
                assert isinstance(found, Tensor)
                expected = found.float() if expected is None else expected
                off = float((found.float() - expected).abs().max() / expected.std())
                errors.append("" if off <= MOST_OFF else f"results are off by {off:.2g} standard deviations")
            except Exception as error:
                errors.append(said_by(error))
        return errors

    def _of(self, shape: WeightShape) -> Operand:
        if shape not in self._operands:
            self._operands[shape] = random_operand(shape, BITS, self.device)
        return self._operands[shape]

    def _call(self, bucket: Bucket, operand: Operand, tokens: int, option: Option) -> Call:
        """A product with this launch, past the rules."""
        from ciuic_kernels.triton.experts import expert_linear  # imports Triton
        from ciuic_kernels.triton.linear import linear

        shape, packed = bucket.shape, operand.packed
        if bucket.op == LINEAR:
            x = activations(tokens, shape.cols, torch.bfloat16, self.device)
        else:
            drawn = routing(ceil_div(tokens, shape.routed), shape, self.device)
            ids = drawn.flatten()[:tokens].contiguous()
            x = activations(tokens, shape.cols, torch.bfloat16, self.device)
        launch = self._launch(option)
        if launch is None:
            return partial(dense_product, x, operand.matrix())
        work, kinds = operand.derived.work, operand.derived.kinds
        if bucket.op == LINEAR:
            return partial(
                linear, x=x, arena=packed.arena, tags=packed.tags, work=work, kinds=kinds, bias=None,
                rows=shape.rows, launch=launch,
            )  # fmt: skip
        return partial(
            expert_linear, x=x, fan=1, expert_ids=ids, arena=packed.arena, tags=packed.tags, work=work, kinds=kinds,
            rows=shape.rows, launch=launch,
        )  # fmt: skip
