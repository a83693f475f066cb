"""``modules``: roles, name patterns, codec names and raw; the most specific wins; tied weights stay together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ciuic_hf import CiuicConfig, CiuicError

ATTENTION, EXPERTS = "model.layers.{}.self_attn.o_proj.weight", "model.layers.{}.mlp.experts.down_proj"
MLP, SHARED = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.shared_experts.up_proj.weight"
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def bits(model: Any) -> dict[str, float]:
    """Bits per weight by name; 16 for what was kept."""
    report = model.ciuic_report
    return {p.name: p.bits_per_weight for p in report.compressed} | {k.name: 16.0 for k in report.kept}


def test_roles(checkpoint: Callable[[str], Path], load: Callable[..., Any]) -> None:
    settings = {
        "attention": 6,
        "mlp": 5,
        "shared_experts": 4,
        "experts": 3,
        "embeddings": 10,
        "lm_head": "raw",
    }
    model = load(checkpoint("v3_bf16"), 2.5, settings)
    found = bits(model)
    for name, upper in (
        (ATTENTION.format(1), 6),
        (MLP, 5),
        (SHARED, 4),
        (EXPERTS.format(1), 3),
        (TABLES[0], 10),
    ):
        assert upper - 1.5 < found[name] <= upper, name
    assert found[TABLES[1]] == 16 and type(model.lm_head) is torch.nn.Linear


def test_linear_covers_the_roles_that_are_not_set(
    checkpoint: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    found = bits(load(checkpoint("v3_bf16"), 3, {"linear": 8, "attention": 5}))
    assert 4 < found[ATTENTION.format(0)] <= 5
    assert found[MLP] > 6 and found[SHARED] > 6
    assert found[EXPERTS.format(1)] <= 3


def test_the_longest_pattern_wins_over_shorter_ones_and_roles(
    checkpoint: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    settings = {
        "attention": 3,
        "layers.1.": 5,
        "model.layers.1.self_attn.o_proj": "grid8_g32",
        "*.kv_b_proj.weight": "raw",
    }
    model = load(checkpoint("v3_bf16"), 2.5, settings)
    found = bits(model)
    assert found[ATTENTION.format(0)] <= 3
    assert found[ATTENTION.format(1)] > 8
    assert 4 < found["model.layers.1.self_attn.q_b_proj.weight"] <= 5
    assert found["model.layers.1.self_attn.kv_b_proj.weight"] == 16
    assert 4 < found[EXPERTS.format(1)] <= 5
    assert found[EXPERTS.format(2)] <= 2.5


def test_a_pattern_starts_at_a_component(checkpoint: Callable[[str], Path], load: Callable[..., Any]) -> None:
    found = bits(load(checkpoint("llama_untied"), 3, {"up": 8, "up_proj": 6, "layers.0": "raw"}))
    assert found["model.layers.0.mlp.up_proj.weight"] == 16
    assert 5 < found["model.layers.1.mlp.up_proj.weight"] <= 6
    assert found["model.layers.1.mlp.gate_proj.weight"] <= 3
    with pytest.raises(CiuicError, match=r"'proj'.*matches no weight"):
        load(checkpoint("llama_untied"), 3, {"proj": 8})


@pytest.mark.parametrize("codec", ["grid2_g64", "grid3_g32", "grid8_g64", "sparse4_d8", "raw_bf16", "zero"])
def test_a_codec_by_name_takes_every_block(
    codec: str,
    checkpoint: Callable[[str], Path],
    load: Callable[..., Any],
    source_of: Callable[[Path], Any],
    assert_encoded: Callable[..., None],
) -> None:
    model = load(
        checkpoint("v3_fused"), 4, dict.fromkeys(("linear", "experts", "embeddings", "lm_head"), codec)
    )
    assert all(set(p.codecs) == {codec} for p in model.ciuic_report.compressed)
    assert_encoded(model, source_of(checkpoint("v3_fused")), lambda _: codec)


@pytest.mark.parametrize("family", ["v3_bf16", "v3_fp8", "v3_fused"])
def test_raw_experts_are_the_source(
    family: str, checkpoint: Callable[[str], Path], load: Callable[..., Any], source_of: Callable[[Path], Any]
) -> None:
    path = checkpoint(family)
    model, source = load(path, 4, {"experts": "raw", "layers.0.mlp": "raw"}), source_of(path)
    for name in (EXPERTS.format(1), "model.layers.2.mlp.experts.gate_up_proj", MLP):
        assert torch.equal(model.get_parameter(name), source[name].to(torch.bfloat16)), name


@pytest.mark.parametrize("family", ["v3_bf16", "v3_fp8", "v3_fused"])
def test_experts_are_compressed_both_or_neither(
    family: str, checkpoint: Callable[[str], Path], load: Callable[..., Any], source_of: Callable[[Path], Any]
) -> None:
    path, prefix = checkpoint(family), "model.layers.1.mlp.experts."
    model, source = load(path, 8, {prefix + "down_proj": "raw"}), source_of(path)
    for name in (prefix + "down_proj", prefix + "gate_up_proj"):
        assert torch.equal(model.get_parameter(name), source[name].to(torch.bfloat16)), name
    reasons = {k.name: k.reason for k in model.ciuic_report.kept}
    assert "down_proj" in reasons[prefix + "gate_up_proj"]
    assert EXPERTS.format(2) in {p.name for p in model.ciuic_report.compressed}


@pytest.mark.parametrize(
    "settings",
    [None, {"embeddings": 5}, {"lm_head": 5}, {"embeddings": 5, "lm_head": 5}, {"model.embed_tokens": 5}],
)
def test_tied_tables_are_compressed_together(
    settings: Any, checkpoint: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    model = load(checkpoint("qwen2_tied"), 4, settings)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight_tags is model.model.embed_tokens.weight_tags
    (table,) = (p for p in model.ciuic_report.compressed if p.role in ("embeddings", "lm_head"))
    assert (4 < table.bits_per_weight <= 5) if settings else (7 < table.bits_per_weight <= 8)


def test_tables_that_only_the_config_ties_stay_two(
    checkpoint: Callable[[str], Path], load: Callable[..., Any], ids: torch.Tensor, tmp_path: Path
) -> None:
    """Such as fine-tuned models whose files hold another lm_head: transformers does not tie those."""
    untied = load(checkpoint("llama_untied"))
    untied.config.tie_word_embeddings = True
    untied.save_pretrained(tmp_path / "dense")
    model, expected = load(tmp_path / "dense", 4), load(checkpoint("llama_untied"), 4)
    for one in (model, expected):
        assert one.lm_head.weight is not one.model.embed_tokens.weight
    assert torch.equal(model(ids).logits, expected(ids).logits)
    model.save_pretrained(tmp_path / "compressed")
    assert torch.equal(load(tmp_path / "compressed")(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("role", ["embeddings", "lm_head"])
def test_tied_tables_are_raw_together(
    role: str, checkpoint: Callable[[str], Path], load: Callable[..., Any], ids: torch.Tensor
) -> None:
    model = load(checkpoint("qwen2_tied"), 4, {role: "raw"})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.isfinite(model(ids).logits).all()


def test_tied_tables_cannot_be_told_different_things(
    checkpoint: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    for settings in ({"embeddings": 8, "lm_head": 4}, {"embeddings": "raw", "lm_head": 4}):
        with pytest.raises(CiuicError, match=r"lm_head\.weight is tied to .*embed_tokens\.weight.*same"):
            load(checkpoint("qwen2_tied"), 4, settings)


def test_one_config_serves_many_loads(checkpoint: Callable[[str], Path], load: Callable[..., Any]) -> None:
    config = CiuicConfig(bits=4.25, modules={"embeddings": 6})
    before = config.to_dict()
    for family in ("llama_untied", "v3_fp8"):
        load(checkpoint(family), quantization_config=config)
    assert config.to_dict() == before
