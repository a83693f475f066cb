"""The formula of training memory, against what autograd saves in small models: equal, byte by byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from ciuic_hf.errors import CiuicError
from ciuic_hf.planning.adapters import Adapters, Layout
from ciuic_hf.planning.memory import Run, Sizes
from ciuic_hf.planning.saved import Batch, Step, total_nbytes
from ciuic_hf.planning.training import Recipe, training_footprint
from ciuic_hf.runtime.packing import stored_nbytes
from tests.planning.counted import MODELS, adapted, counted_nbytes, save_model

BATCH, LENGTH, RANK = 2, 48, 8
LORA: dict[str, dict[str, Any]] = {
    "attention": {
        "target_modules": [
            *("q_proj", "k_proj", "v_proj", "o_proj"),
            *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
        ]
    },
    "all-linear": {"target_modules": "all-linear"},
    "o_proj": {"target_modules": ["o_proj"]},
    "mlp": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "experts": {
        "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}
FAST = [
    ("llama", "all-linear", "sdpa", 0.0),
    ("llama", "attention", "eager", 0.1),
    ("deepseek_v3", "experts", "sdpa", 0.0),
    ("deepseek_v3 equal widths", "all-linear", "sdpa", 0.0),
]
SLOW = [
    (name, target, attention, 0.0)
    for name in MODELS
    for target in ("attention", "all-linear", "o_proj", "experts" if "deepseek" in name else "mlp")
    for attention in ("sdpa", "eager")
]


def adapters_of(name: str, targets: list[str], dropout: float = 0.0, rank: int = RANK) -> Adapters:
    config = AutoConfig.for_model(name.split()[0], **MODELS[name]).to_dict()
    return Adapters.of(Layout.of(Sizes(config)), targets, rank, bool(dropout))


def recipe_of(adapters: Adapters, **more: Any) -> Recipe:
    return Recipe(adapters, Run(2, None, "cpu"), stored_nbytes, **more)


@pytest.mark.parametrize(
    ("name", "target", "attention", "dropout"),
    [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
@pytest.mark.filterwarnings("ignore")  # PEFT's, of patterns that a model has no use for
def test_saved_bytes_are_those_that_autograd_saves(
    name: str, target: str, attention: str, dropout: float, tmp_path: Path
) -> None:
    lora = LORA[target] | {"r": RANK, "lora_dropout": dropout}
    model = adapted(save_model(tmp_path, name), lora, attention)
    adapters = adapters_of(name, [target], dropout)
    step = Step(
        adapters, Run(2, None, "cpu", attention if attention == "eager" else None), Batch(BATCH, LENGTH)
    )
    found = total_nbytes([*(one for layer in step.layers for one in layer), *step.shared.values(), *step.end])
    assert adapters.numel == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found == counted_nbytes(model, torch.arange(BATCH * LENGTH).view(BATCH, LENGTH))


@given(
    name=st.sampled_from(sorted(MODELS)),
    length=st.integers(32, 300),
    batch=st.integers(1, 5),
    bits=st.sampled_from([None, 8, 4, 2]),
    checkpointing=st.booleans(),
)
def test_more_work_takes_no_less(
    name: str, length: int, batch: int, bits: int | None, checkpointing: bool
) -> None:
    recipe = recipe_of(adapters_of(name, ["attention"]), activation_bits=bits, checkpointing=checkpointing)
    found = training_footprint(recipe, length, batch)
    assert all(value >= 0 for value in vars(found).values())
    assert training_footprint(recipe, 2 * length, batch).total >= found.total
    assert training_footprint(recipe, length, 2 * batch).total >= found.total


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_fewer_bits_and_recomputing_save_activations(name: str) -> None:
    adapters = adapters_of(name, ["all-linear"])
    plain = training_footprint(recipe_of(adapters), 512, 4)
    packed = [training_footprint(recipe_of(adapters, activation_bits=b), 512, 4) for b in (8, 4, 2)]
    activations = [found.activations for found in (plain, *packed)]
    assert activations == sorted(activations, reverse=True)
    recomputed = training_footprint(recipe_of(adapters, checkpointing=True), 512, 4)
    assert recomputed.activations < plain.activations and recomputed.total < plain.total


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(CiuicError, match=r"gemma2.*knows deepseek_v2"):
        Layout.of(Sizes(AutoConfig.for_model("gemma2").to_dict()))
    with pytest.raises(CiuicError, match=r"attention, experts, all-linear.*'mlp'"):
        adapters_of("deepseek_v3", ["mlp"])
    with pytest.raises(CiuicError, match="no dropout"):
        adapters_of("deepseek_v3", ["experts"], dropout=0.1)
    with pytest.raises(CiuicError, match="rank"):
        adapters_of("llama", ["attention"], rank=0)
    with pytest.raises(CiuicError, match="seq must be"):
        training_footprint(recipe_of(adapters_of("llama", ["attention"])), 0, 1)
    with pytest.raises(CiuicError, match="adamw, sgd"):
        training_footprint(recipe_of(adapters_of("llama", ["attention"]), optimizer="lion"), 8, 1)
