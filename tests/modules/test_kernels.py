"""Kernels are compiled before they are needed, and are those that products start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from ciuic_hf.modules.embedding import CiuicEmbedding
from ciuic_hf.modules.experts import adopt_experts
from ciuic_hf.modules.kernels import compile_kernels
from ciuic_hf.modules.linear import CiuicLinear
from ciuic_hf.modules.packed import PackedModule
from ciuic_hf.modules.siblings import group_siblings, multiply
from tests.kernels.samples import packed_sample
from tests.triton.interpreted import gpu_kernels, needs_interpreter
from tests.triton.measurement import ROOT

HALF = torch.float16
EXPERTS, HIDDEN, INNER, ROUTED = 3, 128, 64, 2


def modules() -> list[PackedModule]:
    """Linears of one, two and many kinds, experts, and a table."""
    linears = [
        CiuicLinear.from_packed(packed_sample((64, 128), 1, codecs), dtype=HALF)
        for codecs in (("grid4_g64",), ("grid4_g64",), ("grid2_g64", "grid8_g32"), ())
    ]
    config = DeepseekV3Config(hidden_size=HIDDEN, moe_intermediate_size=INNER, n_routed_experts=EXPERTS)
    experts = adopt_experts(DeepseekV3Experts(config), HALF)
    for name, shape in experts.packed_shapes.items():
        experts.set_packed(name, packed_sample(tuple(shape), 2, ("grid4_g64", "grid5_g32")))
    table = CiuicEmbedding.adopt(torch.nn.Embedding(70, 128), HALF)
    table.set_packed("weight", packed_sample((70, 128), 3))
    return [*linears, experts, table]


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[bool, tuple[Any, ...]]]]:
    """What is given to kernels instead of running them: whether only to compile, and what the code depends on."""
    from triton.runtime.interpreter import InterpretedFunction

    seen: list[tuple[bool, tuple[Any, ...]]] = []

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **settings: Any) -> None:
        kinds = tuple(type(a) if not isinstance(a, torch.Tensor) else a.dtype for a in arguments)
        seen.append((warmup, (self.fn.__name__, kinds, *sorted(settings.items()))))

    monkeypatch.setattr(InterpretedFunction, "run", run)
    with gpu_kernels():
        yield seen


@needs_interpreter
def test_what_products_start_was_compiled(starts: list[tuple[bool, tuple[Any, ...]]]) -> None:
    linears_and_more = modules()
    compile_kernels(linears_and_more, HALF, ROUTED, workers=1)
    assert starts and all(only_compiled for only_compiled, _ in starts)
    compiled = {kernel for _, kernel in starts}
    starts.clear()
    *linears, experts, table = linears_and_more
    with torch.no_grad():
        for tokens in (1, 7, 8, 9, 13, 25, 30, 33, 70, 256, 257):
            for linear in linears:
                linear(torch.zeros(tokens, 128, dtype=HALF))
            ids = torch.zeros(tokens, ROUTED, dtype=torch.int64)
            experts(torch.zeros(tokens, HIDDEN, dtype=HALF), ids, torch.ones(tokens, ROUTED, dtype=HALF))
            table(ids)
    started = {kernel for only_compiled, kernel in starts if not only_compiled}
    assert len(started) > 10
    assert started <= compiled


@needs_interpreter
def test_equal_modules_are_rehearsed_once(starts: list[tuple[bool, tuple[Any, ...]]]) -> None:
    one, same, *_ = modules()
    compile_kernels([one], HALF, ROUTED, workers=1)
    alone = len(starts)
    compile_kernels([one, same], HALF, ROUTED, workers=1)
    assert len(starts) == 2 * alone


@needs_interpreter
def test_launches_of_siblings_are_compiled(starts: list[tuple[bool, tuple[Any, ...]]]) -> None:
    linears = [
        CiuicLinear.from_packed(packed_sample((64, 128), 1, codecs), dtype=HALF)
        for codecs in (("grid4_g64",), ("grid6_g32",))
    ]
    parent = torch.nn.ModuleDict(dict(zip(("gate_proj", "up_proj"), linears, strict=True)))
    assert group_siblings(parent)
    compile_kernels(linears, HALF, ROUTED, workers=1)
    compiled = {kernel for only_compiled, kernel in starts if only_compiled}
    starts.clear()
    for tokens in (1, 9, 17, 32):
        multiply(linears, torch.zeros(tokens, 128, dtype=HALF))
    started = {kernel for _, kernel in starts}
    assert {name for name, *_ in started} == {"linears_kernel"}
    assert len(started) == 3
    assert started <= compiled


@pytest.mark.slow
def test_compiles_for_a_gpu_that_is_not_there() -> None:
    """With the real compiler: several kernels side by side, and none a second time."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton.ahead"],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    assert said["products"] >= 4
    assert said["latents"] == said["heads"] == 3  # with and without a mask, and merging
    assert said["first"] == said["products"] + 6 and said["again"] == 0
    assert said["attended"] == 10 and said["steps"] == 0
