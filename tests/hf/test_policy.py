"""The rate-distortion policy through ``from_pretrained``: by kind, by measured sensitivities, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from ciuic_hf import CiuicConfig, CiuicError
from ciuic_hf.config import LINEAR_ROLES
from ciuic_hf.hf.probe import block_sums, measure, own_text
from ciuic_hf.planning.sensitivity import Sensitivity
from ciuic_kernels.packing import decode_tensor, encode_tensor

BLOCK_ROLES = [*LINEAR_ROLES, "experts"]


@pytest.fixture(scope="module")
def sensitivity(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Measured on the tiny DeepSeek-V3."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint("v3_bf16"), dtype=torch.float32)
    path = tmp_path_factory.mktemp("sensitivity") / "sens.safetensors"
    measure(model, own_text(model, 256), "test").save(path)
    return path


@pytest.mark.parametrize("family", ["v3_bf16", "v3_fp8", "v3_fused"])
def test_measured_sensitivities_are_followed(
    family: str,
    checkpoint: Callable[[str], Path],
    source_of: Callable[[Path], dict[str, torch.Tensor]],
    sensitivity: Path,
    tmp_path: Path,
) -> None:
    """Every weight is the encoding of its source in the codecs of the plan, within the bits, and saves and reloads."""
    config = CiuicConfig(bits=4.5, sensitivity=sensitivity)
    model = AutoModelForCausalLM.from_pretrained(checkpoint(family), quantization_config=config)
    bits = model.ciuic_report.bits_per_weight(BLOCK_ROLES)
    assert 4.3 < bits <= 4.5
    source = source_of(checkpoint(family))
    for name in ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.0.self_attn.q_b_proj.weight"):
        module = model.get_submodule(name.rpartition(".")[0])
        packed = module.packed(name.rpartition(".")[2])
        again = encode_tensor(source[name], packed.tags[..., 0])
        assert torch.equal(packed.arena, again.arena) and torch.equal(packed.tags, again.tags)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    before, after = model.state_dict(), reloaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert "sens" not in (tmp_path / "config.json").read_text()


def test_experts_can_differ(checkpoint: Callable[[str], Path], sensitivity: Path, tmp_path: Path) -> None:
    blocks = dict(Sensitivity.load(sensitivity).blocks)
    name = "model.layers.1.mlp.experts.down_proj"
    blocks[name] = blocks[name].clone()
    blocks[name][2] *= 1e4
    Sensitivity(blocks, "test", 1).save(tmp_path / "s.safetensors")
    config = CiuicConfig(bits=4, sensitivity=tmp_path / "s.safetensors")
    model = AutoModelForCausalLM.from_pretrained(checkpoint("v3_fp8"), quantization_config=config)
    tags = model.get_parameter(f"{name}_tags")[..., 0].float()
    assert ((tags[2] % 32 >= 6) | (tags[2] == 1)).all()  # six bits or more, or raw
    assert not torch.equal(tags[2], tags[1])
    model(torch.arange(8)[None])  # reads every expert at its own place


def test_without_a_measurement_the_kind_decides(
    checkpoint: Callable[[str], Path], load: Callable[..., PreTrainedModel]
) -> None:
    model: Any = load(checkpoint("llama_wide"), 4, policy="rate-distortion")
    report = model.ciuic_report
    assert report.bits_per_weight(BLOCK_ROLES) <= 4
    bits = {p.name: p.bits_per_weight for p in report.compressed}
    assert bits["model.layers.0.self_attn.v_proj.weight"] > bits["model.layers.0.self_attn.q_proj.weight"]
    assert bits["lm_head.weight"] == pytest.approx(8, abs=0.1)


def test_settings_of_their_own_are_pools_of_their_own(
    checkpoint: Callable[[str], Path], load: Callable[..., PreTrainedModel]
) -> None:
    modules = {"attention": 6, "model.layers.1.mlp.up_proj": "grid3_g64"}
    model: Any = load(checkpoint("llama_wide"), 4, modules=modules, policy="rate-distortion")
    report = model.ciuic_report
    assert 5.9 < report.bits_per_weight(["attention"]) <= 6
    named = next(p for p in report.compressed if p.name == "model.layers.1.mlp.up_proj.weight")
    assert set(named.codecs) == {"grid3_g64"}


def test_sensitivities_of_another_model_are_refused(
    checkpoint: Callable[[str], Path], sensitivity: Path
) -> None:
    config = CiuicConfig(bits=4, sensitivity=sensitivity)
    with pytest.raises(CiuicError, match=r"measured on another model: this one has .*self_attn"):
        AutoModelForCausalLM.from_pretrained(checkpoint("llama_wide"), quantization_config=config)


def test_a_file_of_something_else_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"junk")
    for file, message in (
        (checkpoint("llama_wide") / "model.safetensors", "holds no sensitivities"),
        (tmp_path / "junk", "holds no sensitivities"),
        (tmp_path / "missing", "There is no file"),
    ):
        if file.name == "model.safetensors" and not file.exists():
            file = next(checkpoint("llama_wide").glob("*.safetensors"))
        with pytest.raises(CiuicError, match=message):
            Sensitivity.load(file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "best"}, "policy must be one of rate-distortion, uniform, adaptive, got 'best'"),
        ({"policy": "adaptive", "bits": 4}, "goes by the weights alone"),
        ({"policy": "adaptive", "memory": "1GB", "context": 9}, "goes by the weights alone"),
        ({"policy": "uniform", "sensitivity": "s.safetensors"}, "sensitivity is for"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CiuicError, match=message):
        CiuicConfig(**options)


def exact(model: Any, ids: torch.Tensor, name: str) -> torch.Tensor:
    """``1/2 sum(F) mean(W^2)`` of every block from explicit products ``(g_i x_j)^2``, labels drawn in the same way."""
    weight, caught = model.get_parameter(name), []
    module = model.get_submodule(name.removesuffix(".weight"))
    hook = module.register_forward_hook(
        lambda _m, inputs, out: (out.retain_grad(), caught.append((inputs[0], out)))[0]
    )
    generator, fisher = torch.Generator().manual_seed(1), torch.zeros_like(weight)
    for row in ids:
        logits = model(input_ids=row[None], use_cache=False).logits[0]
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        cross_entropy(logits, labels, reduction="sum").backward()
        x, out = caught.pop()
        fisher += torch.einsum("ti,tj->ij", out.grad[0].square(), x[0].detach().square())
    hook.remove()
    sums = block_sums(block_sums(fisher / ids.numel(), 128).T, 64).T
    energy = block_sums(block_sums(weight.detach().square(), 128).T, 64).T
    count = block_sums(block_sums(torch.ones_like(weight), 128).T, 64).T
    return (0.5 * sums * energy / count).detach()


def test_probing_gives_the_fisher_energy_of_every_block(checkpoint: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama_untied"), dtype=torch.float32)
    ids = torch.arange(2, 50).view(3, 16)
    name = "model.layers.0.mlp.down_proj.weight"
    wanted, found = exact(model, ids, name), measure(model, ids, "test").blocks[name]
    assert tuple(found.shape) == (3, 3)
    torch.testing.assert_close(found, wanted.clamp(min=0.01 * float(wanted.mean())), rtol=1e-4, atol=0)
    assert all(p.requires_grad for p in model.parameters())


def test_probing_leaves_experts_computing_what_they_compute(checkpoint: Callable[[str], Path]) -> None:
    """Sensitivities predict a small change of the model: KL of a rounded expert layer, within a factor of 3."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint("v3_bf16"), dtype=torch.float32)
    ids = own_text(model, 512)
    before = model(ids).logits.log_softmax(-1).detach()
    found = measure(model, ids, "test")
    assert torch.equal(model(ids).logits.log_softmax(-1), before)
    name = "model.layers.1.mlp.experts.down_proj"
    weight = model.get_parameter(name).data
    ids_of = torch.full(found.blocks[name].shape, 36, dtype=torch.uint8)  # grid4_g32
    rounded = decode_tensor(encode_tensor(weight, ids_of))
    relative = float((rounded - weight).square().sum() / weight.square().sum())
    weight.copy_(rounded)
    after = model(ids).logits.log_softmax(-1).detach()
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    assert kl / 3 < relative * float(found.blocks[name].sum()) < kl * 3
