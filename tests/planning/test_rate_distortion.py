"""Plans by importance on any shapes: within the budget, near it, and more bits where more depends on them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_hf.errors import CiuicError
from ciuic_hf.planning.distortion import MENU, relative_errors
from ciuic_hf.planning.priors import prior_sensitivity
from ciuic_hf.planning.rate_distortion import Weighed, codec_ids_of, plan_blocks
from ciuic_kernels import BlockGrid, all_codecs, codec_by_id, codec_by_name
from ciuic_kernels.layout import arena_nbytes

SHAPES = st.one_of(
    st.tuples(st.integers(30, 300), st.integers(30, 400)),
    st.tuples(st.integers(1, 4), st.integers(30, 150), st.integers(30, 300)),
)


def with_blocks(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(BlockGrid(shape).tags_shape[:-1], generator=generator).pow(4) + 1e-3


@settings(max_examples=60)
@given(st.lists(st.tuples(SHAPES, st.booleans()), min_size=1, max_size=5), st.floats(3, 16))
def test_the_bytes_are_what_is_stored_and_within_the_budget(
    shapes: list[tuple[tuple[int, ...], bool]], bits: float
) -> None:
    parameters = [
        Weighed(f"w{i}", shape, with_blocks(shape, i) if measured else 0.1 + i)
        for i, (shape, measured) in enumerate(shapes)
    ]
    budget = int(bits / 8 * sum(p.grid.numel for p in parameters)) + 200 * len(parameters)
    plan = plan_blocks(parameters, budget)
    stored = 0
    for parameter in parameters:
        ids = codec_ids_of(parameter, plan.chosen[parameter.name])
        assert ids.dtype == torch.uint8 and tuple(ids.shape) == parameter.grid.tags_shape[:-1]
        assert {codec_by_id(i).name for i in ids.unique().tolist()} <= set(MENU)
        stored += arena_nbytes(ids, parameter.grid) + parameter.grid.tags_nbytes
    assert stored == plan.nbytes <= budget
    richest = all(int(c.low.min()) == codec_by_name("raw_bf16").id for c in plan.chosen.values())
    assert richest or budget - plan.nbytes < 64 * 128 * 2


def test_what_matters_more_gets_more_bits() -> None:
    blocks = torch.ones(4, 4)
    blocks[1, 2] = 1000.0
    parameters = [
        Weighed("dull", (256, 512), 1.0),
        Weighed("vital", (256, 512), 100.0),
        Weighed("spot", (256, 512), blocks),
    ]
    plan = plan_blocks(parameters, 3 * 256 * 512 * 4 // 8)
    ids = {p.name: codec_ids_of(p, plan.chosen[p.name]) for p in parameters}
    rate = {name: sum(codec_by_id(i).bits for i in chosen.flatten().tolist()) for name, chosen in ids.items()}
    assert rate["vital"] > rate["spot"] > rate["dull"]
    assert codec_by_id(int(ids["spot"][1, 2])).bits == max(
        codec_by_id(i).bits for i in ids["spot"].flatten().tolist()
    )


def test_equal_blocks_share_one_rate_and_are_spread_evenly() -> None:
    parameter = Weighed("w", (4096, 4096), 1.0)
    plan = plan_blocks([parameter], 4096 * 4096 * 17 // 32)
    ids = codec_ids_of(parameter, plan.chosen["w"]).flatten()
    assert len(ids.unique()) <= 2
    shares = [(quarter == ids.max()).float().mean().item() for quarter in ids.chunk(4)]
    assert max(shares) - min(shares) < 0.01


def test_too_few_bits_are_refused_with_the_number_that_would_do() -> None:
    with pytest.raises(CiuicError, match=r"2\.00 bits each, and need .*\(2\.13\).*policy=\"uniform\""):
        plan_blocks([Weighed("w", (512, 512), 1.0)], 512 * 512 * 2 // 8)


def test_errors_fall_with_the_rate_of_each_group_size() -> None:
    errors = relative_errors()
    assert "zero" not in errors and errors["raw_bf16"] == 0.0
    for group in (32, 64):
        rates = [
            errors[c.name]
            for c in sorted(all_codecs(), key=lambda c: c.bits)
            if c.name.endswith(f"_g{group}")
        ]
        assert rates == sorted(rates, reverse=True) and 3.5 < rates[0] / rates[1] < 6


def test_priors_go_by_kind_and_place() -> None:
    shapes = {
        f"model.layers.{i}.self_attn.{kind}.weight": (64, 64)
        for i in range(3)
        for kind in ("q_proj", "v_proj")
    }
    shapes |= {f"model.layers.{i}.mlp.down_proj.weight": (64, 64) for i in range(3)}
    shapes |= {"model.layers.1.mlp.experts.down_proj": (4, 64, 64), "unheard.of": (64, 64)}
    prior = prior_sensitivity(shapes)
    assert (
        prior["model.layers.1.self_attn.v_proj.weight"] > 5 * prior["model.layers.1.self_attn.q_proj.weight"]
    )
    assert prior["model.layers.2.mlp.down_proj.weight"] > prior["model.layers.1.mlp.down_proj.weight"]
    assert prior["unheard.of"] == 64 * 64
    assert prior["model.layers.1.mlp.experts.down_proj"] < 4 * prior["unheard.of"]
