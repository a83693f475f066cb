"""Maps, curves and comparisons are sums over the blocks that a checkpoint or plan names."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from ciuic_hf.errors import CiuicError
from ciuic_hf.pictures import colours, terminal
from ciuic_hf.pictures.blocks import ModelBlocks, ParameterBlocks, read_blocks
from ciuic_hf.pictures.compare import compare_models
from ciuic_hf.pictures.curve import trace_curve
from ciuic_hf.pictures.layers import map_bits
from ciuic_hf.pictures.matrix import map_matrix
from ciuic_hf.planning.plan import ModelPlan
from ciuic_hf.planning.priors import prior_sensitivity
from ciuic_hf.planning.rate_distortion import Weighed, codec_ids_of, plan_blocks
from ciuic_kernels import BlockGrid, codec_by_name
from ciuic_kernels.layout import arena_nbytes

CODECS = ["grid2_g64", "grid3_g32", "grid4_g64", "grid6_g32", "grid8_g64", "raw_bf16"]
SHAPES = {
    "model.embed_tokens.weight": (300, 200),
    "model.layers.0.self_attn.q_proj.weight": (130, 200),
    "model.layers.0.mlp.down_proj.weight": (200, 300),
    "model.layers.1.self_attn.q_proj.weight": (130, 200),
    "model.layers.1.mlp.experts.gate_up_proj": (3, 96, 200),
    "lm_head.weight": (300, 200),
}
ROLES = ["embeddings", "attention", "mlp", "attention", "experts", "lm_head"]


def model_of(seed: int, codecs: list[str] = CODECS, *, differ: bool = True) -> ModelBlocks:
    """Random codecs for ``SHAPES``."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([codec_by_name(name).id for name in codecs], dtype=torch.uint8)
    parameters = []
    for (name, shape), role in zip(SHAPES.items(), ROLES, strict=True):
        size = BlockGrid(shape if differ else shape[-2:]).tags_shape[:-1]
        picks = torch.randint(len(codecs), size, generator=generator)
        parameters.append(ParameterBlocks(name, role, shape, ids[picks]))
    return ModelBlocks(f"model {seed}", parameters)


def shown(picture: object, width: int = 80) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(picture)
    return capture.get()


@given(seed=st.integers(0, 1000), differ=st.booleans())
@settings(max_examples=20, deadline=None)
def test_bytes_are_those_of_arena_and_tags(seed: int, differ: bool) -> None:
    for parameter in model_of(seed, differ=differ).parameters:
        grid = parameter.grid
        every = parameter.codecs.expand(grid.tags_shape[:-1])
        assert parameter.nbytes == arena_nbytes(every, grid) + grid.tags_nbytes
        assert sum(parameter.codec_counts().values()) == grid.matrices * grid.blocks


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_role_of_the_map_is_the_mean_of_its_weights(seed: int) -> None:
    model = model_of(seed)
    found = map_bits(model)
    assert found.layers == (0, 1) and [name for name, _ in found.outside] == [
        "model.embed_tokens.weight",
        "lm_head.weight",
    ]
    for row in found.rows:
        mine = [p for p in model.parameters if p.role == row.label]
        assert row.total == pytest.approx(8 * sum(p.nbytes for p in mine) / sum(p.grid.numel for p in mine))
    mlp = next(row for row in found.rows if row.label == "mlp")
    assert math.isnan(mlp.values[1]) and mlp.values[0] == pytest.approx(mlp.total)


@given(seed=st.integers(0, 1000))
@settings(max_examples=3, deadline=None)
def test_no_choice_lies_under_the_curve(seed: int) -> None:
    curve = trace_curve([model_of(seed)])
    assert curve is not None and curve.left_out == 0
    (chosen,) = curve.chosen
    for points in (curve.best, [*curve.uniform.values()]):
        assert [p.bits for p in points] == sorted(p.bits for p in points)
    assert [p.error for p in curve.best] == sorted((p.error for p in curve.best), reverse=True)
    for candidate in (chosen, *curve.uniform.values()):
        smaller = [p.error for p in curve.best if p.bits <= candidate.bits]
        larger = [p.error for p in curve.best if p.bits > candidate.bits]
        assert not smaller or not larger or candidate.error >= min(larger, default=0.0) * (1 - 1e-9)


def test_a_plan_by_kind_lies_on_the_curve() -> None:
    model = model_of(0)
    pooled = {p.name: p.shape for p in model.parameters if p.role not in ("embeddings", "lm_head")}
    prior = prior_sensitivity(pooled)
    weighed = [Weighed(name, shape, prior[name]) for name, shape in pooled.items()]
    plan = plan_blocks(weighed, sum(math.prod(s) for s in pooled.values()) * 4 // 8)
    ids = {p.name: codec_ids_of(p, plan.chosen[p.name]) for p in weighed}
    planned = ModelBlocks(
        "plan",
        [ParameterBlocks(p.name, p.role, p.shape, ids.get(p.name, p.codecs)) for p in model.parameters],
    )
    curve = trace_curve([planned])
    assert curve is not None
    scale = curve.uniform["grid4_g64"].error
    assert scale == pytest.approx(1.0)
    above = min(p.error for p in curve.best if p.bits <= curve.chosen[0].bits)
    below = max(p.error for p in curve.best if p.bits >= curve.chosen[0].bits)
    assert below <= curve.chosen[0].error * (1 + 1e-9) and curve.chosen[0].error <= above * (1 + 1e-9)


def test_blocks_of_unknown_error_are_left_out_and_counted() -> None:
    curve = trace_curve([model_of(0, ["zero", "grid4_g64", "sparse4_d7"])])
    assert curve is None or curve.left_out > 0
    mixed = ModelBlocks("mixed", [*model_of(1).parameters[:3], *model_of(1, ["zero"]).parameters[3:]])
    curve = trace_curve([mixed])
    assert curve is not None and curve.left_out == 2
    assert "Left out: 2 weights" in shown(terminal.curve(curve, ["mixed"], 80))


@given(seed=st.integers(0, 1000), differ=st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_comparison_counts_every_block_and_reverses(seed: int, differ: bool) -> None:
    before, after = model_of(seed), model_of(seed + 1, differ=differ)
    there, back = compare_models(before, after)[0], compare_models(after, before)[0]
    total, reverse = there.roles[-1], back.roles[-1]
    blocks = sum(p.grid.matrices * p.grid.blocks for p in before.parameters)
    assert total.up + total.down + total.same == blocks
    assert (total.up, total.down, total.same) == (reverse.down, reverse.up, reverse.same)
    assert total.nbytes == (sum(p.nbytes for p in before.parameters), sum(p.nbytes for p in after.parameters))
    for row, other in zip(there.difference.rows, back.difference.rows, strict=True):
        assert row.total == pytest.approx(-other.total)


def test_a_comparison_of_different_models_is_refused() -> None:
    model = model_of(0)
    other = ModelBlocks(
        "other", [ParameterBlocks("lm_head.weight", "lm_head", (64, 128), torch.zeros(1, 1).byte())]
    )
    with pytest.raises(CiuicError, match="different models: lm_head"):
        compare_models(model, other)
    with pytest.raises(CiuicError, match="no compressed weight in common"):
        compare_models(ModelBlocks("a", model.parameters[:1]), ModelBlocks("b", model.parameters[1:]))
    found = compare_models(model, ModelBlocks("b", model.parameters[1:]))[0]
    assert found.only_before == ("model.embed_tokens.weight",) and found.only_after == ()


@given(
    strips=st.integers(1, 90), kblocks=st.integers(1, 90), down=st.integers(1, 40), across=st.integers(1, 40)
)
@settings(max_examples=30, deadline=None)
def test_a_matrix_map_fits_and_merges_fairly(strips: int, kblocks: int, down: int, across: int) -> None:
    generator = torch.Generator().manual_seed(strips * 91 + kblocks)
    ids = torch.tensor([codec_by_name(n).id for n in CODECS[:3]], dtype=torch.uint8)
    codecs = ids[torch.randint(3, (strips, kblocks), generator=generator)]
    found = map_matrix(ParameterBlocks("w", "mlp", (64 * strips, 128 * kblocks), codecs), None, down, across)
    assert found.cells.shape[0] <= down and found.cells.shape[1] <= across
    assert sum(found.shares) == pytest.approx(1.0)
    rows, cols = found.strips_a_cell, found.kblocks_a_cell
    first = codecs[:rows, :cols]
    counts = torch.stack([(first == codec_by_name(name).id).sum() for name in found.codecs])
    assert int(found.cells[0, 0]) == int(counts.argmax())
    assert float(found.means[0, 0]) == pytest.approx(
        float((counts * torch.arange(len(counts))).sum() / counts.sum()), abs=1e-4
    )


def test_experts_of_a_matrix() -> None:
    model = model_of(0)
    experts = model.find("gate_up_proj")
    for expert in range(3):
        cells = map_matrix(experts, expert, 40, 40)
        names = [[cells.codecs[i] for i in row] for row in cells.cells.tolist()]
        assert names == [[CODECS_BY_ID[i] for i in row] for row in experts.codecs[expert].tolist()]
    with pytest.raises(CiuicError, match="experts 0 to 2, got 3"):
        map_matrix(experts, 3, 40, 40)
    with pytest.raises(CiuicError, match="has no experts"):
        map_matrix(model.find("lm_head"), 0, 40, 40)
    with pytest.raises(CiuicError, match=r"2 weights .* have 'q_proj' in their name"):
        model.find("q_proj")
    with pytest.raises(CiuicError, match="no compressed weight 'nothing'"):
        model.find("nothing")


CODECS_BY_ID = {codec_by_name(name).id: name for name in CODECS}


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("layers", [1, 2, 28, 61, 126])
def test_terminal_maps_stay_within_the_width(layers: int, width: int) -> None:
    ids = torch.full((1, 1), codec_by_name("grid4_g64").id, dtype=torch.uint8)
    model = ModelBlocks(
        "m",
        [ParameterBlocks(f"m.layers.{i}.mlp.up_proj.weight", "mlp", (64, 128), ids) for i in range(layers)],
    )
    text = terminal.layer_map(map_bits(model), width).plain
    assert max(map(len, text.splitlines())) <= width
    assert text.count("4") >= layers
    assert shown(terminal.layer_map(map_bits(model), width), width).strip() == text.strip()


def test_a_plan_of_tied_tables_counts_them_once(tmp_path: Path) -> None:
    ids = {name: p.codecs for name, p in zip(SHAPES, model_of(0, CODECS[:1]).parameters, strict=True)}
    sizes = {p.name: p.nbytes for p in model_of(0, CODECS[:1]).parameters}
    for tied in (False, True):
        nbytes = sum(sizes.values()) - tied * sizes["lm_head.weight"]
        ModelPlan(SHAPES, ids, nbytes, None, {}, {}).save(tmp_path / "plan.json")
        model = read_blocks(tmp_path / "plan.json")
        assert sum(p.nbytes for p in model.parameters) == nbytes
        assert [p.role for p in model.parameters] == ROLES[: 6 - tied]


@given(place=st.floats(0, 1))
def test_lightness_rises_along_the_scale(place: float) -> None:
    """Readable without any colour: more bits are lighter."""

    def light(colour: str) -> float:
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    assert (
        light(colours.along(colours.VIRIDIS, place))
        <= light(colours.along(colours.VIRIDIS, place + 0.1)) + 1.5
    )
