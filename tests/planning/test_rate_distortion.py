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
from ciuic_kernels.packing import decode_tensor, encode_tensor

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


def pruned(shape: tuple[int, ...], zeros: float, seed: int = 0) -> torch.Tensor:
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return weights.where(weights.abs() > weights.abs().flatten().quantile(zeros), 0.0)


def nonzeros_of(weights: torch.Tensor) -> torch.Tensor:
    """int32 ``[strips, kblocks]``, by a loop."""
    strips = [strip.split(128, dim=1) for strip in weights.split(64)]
    return torch.tensor([[int(block.count_nonzero()) for block in row] for row in strips], dtype=torch.int32)


def relative_error(weights: torch.Tensor, ids: torch.Tensor) -> float:
    decoded = decode_tensor(encode_tensor(weights, ids))
    return float((decoded - weights).double().square().sum() / weights.double().square().sum())


@pytest.mark.parametrize("zeros", [0.7, 0.8, 0.9])
def test_a_pruned_weight_is_smaller_than_any_dense_codec_makes_it_at_the_same_error(zeros: float) -> None:
    weights = pruned((512, 1000), zeros)
    for codec in ("grid3_g64", "grid4_g32", "grid5_g64"):
        dense = torch.full((8, 8), codec_by_name(codec).id, dtype=torch.uint8)
        nbytes = arena_nbytes(dense, BlockGrid((512, 1000)))
        parameter = Weighed("w", (512, 1000), 1.0, nonzeros_of(weights))
        plan = plan_blocks([parameter], round(0.75 * nbytes))
        ids = codec_ids_of(parameter, plan.chosen["w"])
        assert relative_error(weights, ids) < relative_error(weights, dense)


@settings(max_examples=30)
@given(SHAPES.filter(lambda shape: len(shape) == 2), st.floats(0, 1), st.integers(0, 100), st.floats(1.4, 6))
def test_no_weight_is_dropped_that_is_not_zero(
    shape: tuple[int, ...], zeros: float, seed: int, bits: float
) -> None:
    """Whatever the density of a block, and blocks of zeros become ``zero``."""
    weights = pruned(shape, zeros, seed) if zeros < 1 else torch.zeros(shape)
    weights[:64, :128] = 0.0
    parameter = Weighed("w", shape, 1.0, nonzeros_of(weights))
    budget = int(bits * weights.numel() / 8) + 300
    try:
        plan = plan_blocks([parameter], budget)
    except CiuicError:
        assert bits < 3.5
        return
    ids = codec_ids_of(parameter, plan.chosen["w"])
    assert codec_by_id(int(ids[0, 0])).name == "zero"
    assert arena_nbytes(ids, parameter.grid) + parameter.grid.tags_nbytes == plan.nbytes <= budget
    assert relative_error(weights, ids) < 0.25 if bool(weights.any()) else plan.nbytes < 300


def test_counts_of_dense_weights_change_nothing() -> None:
    shape, sensitivity = (300, 700), with_blocks((300, 700), 3)
    weights = torch.randn(shape)
    plain, counted = (Weighed("w", shape, sensitivity, counts) for counts in (None, nonzeros_of(weights)))
    ids = [codec_ids_of(p, plan_blocks([p], 100_000).chosen["w"]) for p in (plain, counted)]
    assert torch.equal(*ids)


def test_what_was_pruned_takes_less_of_a_shared_budget() -> None:
    shapes = {"dense": (512, 512), "pruned": (512, 512)}
    parameters = [
        Weighed(name, shape, 1.0, nonzeros_of(pruned(shape, 0.8 if name == "pruned" else 0.0)))
        for name, shape in shapes.items()
    ]
    plan = plan_blocks(parameters, 4 * 512 * 512 * 2 // 8)
    nbytes = {p.name: arena_nbytes(codec_ids_of(p, plan.chosen[p.name]), p.grid) for p in parameters}
    assert nbytes["pruned"] < 0.8 * nbytes["dense"]
