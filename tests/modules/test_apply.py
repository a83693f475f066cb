"""Compressing a plain torch model in place: nothing of transformers in it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.nn.utils import prune

from ciuic_hf import (
    CiuicConfig,
    CiuicEmbedding,
    CiuicError,
    CiuicExperts,
    CiuicLinear,
    apply_ciuic_compression,
)
from ciuic_hf.modules.swap import compressed_modules
from ciuic_kernels.packing import decode_tensor

ARTICLE = {"linear": "quant4", "attention": 6, "embeddings": "quant8", "experts": 3.3, "lm_head": "quant8"}


class Experts(nn.Module):
    """Fused experts with the names and the gate that transformers gives them."""

    is_transposed = has_bias = has_post_expert_norm = False
    has_gate = is_concatenated = True

    def __init__(self, experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inner, hidden) / hidden**0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, inner) / inner**0.5)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for token in range(x.shape[0]):
            for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
                hidden = self._apply_gate(self.gate_up_proj[expert] @ x[token])
                out[token] += weight * (self.down_proj[expert] @ hidden)
        return out


class Toy(nn.Module):
    """One of everything."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 160)
        self.attention = nn.Linear(160, 160)
        self.mlp = nn.Sequential(nn.Linear(160, 264, bias=False), nn.GELU(), nn.Linear(264, 160))
        self.experts = Experts(4, 160, 72)
        self.norm = nn.LayerNorm(160)
        self.lm_head = nn.Linear(160, 300, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attention(x)
        x = self.norm(x + self.mlp(x))
        index = (ids[:, None] + torch.arange(2)) % 4
        return self.lm_head(x + self.experts(x, index, torch.full_like(index, 0.5, dtype=x.dtype)))


@pytest.fixture
def toy() -> Callable[..., Toy]:
    def make(tied: bool = True, dtype: torch.dtype = torch.float32) -> Toy:
        torch.manual_seed(0)
        return Toy(tied).to(dtype)

    return make


IDS = torch.arange(0, 300, 23)


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(t, after[n]) for n, t in before.items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_module(tied: bool, dtype: torch.dtype, toy: Callable[..., Toy]) -> None:
    model, original = toy(tied, dtype), toy(tied, dtype)
    assert apply_ciuic_compression(model, ARTICLE) is model
    assert {name: type(module) for name, module in compressed_modules(model)}.keys() == {
        "embed", "attention", "mlp.0", "mlp.2", "experts", "lm_head",
    }  # fmt: skip
    assert isinstance(model.embed, CiuicEmbedding) and isinstance(model.lm_head, CiuicLinear)
    assert isinstance(model.experts, CiuicExperts) and isinstance(model.experts, Experts)
    assert (model.lm_head.weight is model.embed.weight) == tied
    codecs = {p.name: set(p.codecs) for p in model.ciuic_report.compressed}
    assert codecs["mlp.0.weight"] == {"grid4_g32"} and codecs["embed.weight"] == {"grid8_g32"}
    assert codecs["attention.weight"] <= {"grid5_g32", "grid6_g64", "grid6_g32"}
    assert ("lm_head.weight" in codecs) != tied
    # With the decoded weights put back, the original computes the same.
    with torch.no_grad():
        for name, module in compressed_modules(model):
            for parameter in module.packed_shapes:
                original.get_submodule(name).get_parameter(parameter).copy_(module.dequantize(parameter))
        expected, found = original(IDS), model(IDS)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    assert found.dtype == dtype and (found - expected).norm() / expected.norm() < tolerance


def test_the_report_counts_every_byte(toy: Callable[..., Toy]) -> None:
    model = apply_ciuic_compression(toy(), ARTICLE)
    report = model.ciuic_report
    assert report.nbytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert report.dense_nbytes == sum(p.numel() * p.element_size() for p in toy().parameters())
    assert "Compressed in" in str(report) and {k.name for k in report.kept} >= {"norm.weight", "mlp.2.bias"}


def test_what_comes_after(toy: Callable[..., Toy]) -> None:
    model = apply_ciuic_compression(toy(), ARTICLE)
    expected = model(IDS)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS), expected) and twin.lm_head.weight is twin.embed.weight
    other = apply_ciuic_compression(toy(), ARTICLE)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS), expected)
    assert torch.equal(
        pickle.loads(pickle.dumps(model.attention))(torch.ones(160)), model.attention(torch.ones(160))
    )
    assert torch.equal(model.train()(IDS), expected)  # nothing is inflated
    assert next(compressed_modules(model), None) is not None
    expected.sum().backward()
    assert model.mlp[2].bias.grad is not None and model.norm.weight.grad is not None
    assert model.to(torch.bfloat16)(IDS).dtype == torch.bfloat16


def test_a_model_may_be_one_linear() -> None:
    linear = nn.Linear(300, 200)
    assert apply_ciuic_compression(linear, {"linear": 8}) is linear
    assert isinstance(linear, CiuicLinear) and linear.ciuic_report.compressed[0].name == "weight"


def test_a_config_does_as_well(toy: Callable[..., Toy]) -> None:
    given = apply_ciuic_compression(toy(), CiuicConfig(bits=3.5, modules={"experts": "raw"}))
    spelled = apply_ciuic_compression(toy(), {"experts": "raw"}, bits=3.5)
    assert unchanged(given, spelled.state_dict()) and not isinstance(given.experts, CiuicExperts)
    with pytest.raises(CiuicError, match="give them once"):
        apply_ciuic_compression(toy(), CiuicConfig(bits=3.5), bits=4)


def test_the_full_weights_are_freed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a module is encoded, no weight before it is still there."""
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
    weights = [weakref.ref(layer.weight) for layer in model]
    alive = []
    import ciuic_hf.modules.apply as apply

    encode = apply.encode_tensor

    def watch(*arguments: Any) -> Any:
        gc.collect()
        alive.append(sum(ref() is not None for ref in weights))
        return encode(*arguments)

    monkeypatch.setattr(apply, "encode_tensor", watch)
    apply_ciuic_compression(model)
    assert alive == [3, 2, 1, 0]  # the parameter object goes first, its values are held by the encoder
    assert model.ciuic_report.nbytes < 0.15 * 4 * 256 * 256 * 4 + 4 * 256 * 4


def test_adaptive_looks_at_the_weights(toy: Callable[..., Toy]) -> None:
    model = toy(tied=False)
    with torch.no_grad():
        model.mlp[0].weight[64:128] = 0
        model.experts.down_proj[2] = 0
    expected = model.mlp[0].weight.detach().clone()
    apply_ciuic_compression(model, {"linear": "adaptive", "experts": "adaptive", "embeddings": 8})
    codecs = {p.name: p.codecs for p in model.ciuic_report.compressed}
    assert codecs["mlp.0.weight"] == {"zero": 2, "grid8_g32": 8}
    assert codecs["experts.down_proj"] == {"zero": 3, "grid8_g32": 9}
    decoded = decode_tensor(model.mlp[0].packed("weight"))
    assert (decoded[64:128] == 0).all() and (decoded - expected).norm() / expected.norm() < 0.01
    assert torch.isfinite(model(IDS)).all()


@pytest.mark.parametrize(("setting", "kept"), [("sparse", 0.5), ("sparse30", 0.3125), ("sparse8_d4", 0.125)])
def test_pruning_to_a_density(setting: str, kept: float, toy: Callable[..., Toy]) -> None:
    model = toy(tied=False)
    before = model.attention.weight.detach().clone()
    apply_ciuic_compression(model, {"attention": setting})
    decoded = model.attention.dequantize("weight")
    errors = {p.name: p.relative_error for p in model.ciuic_report.compressed}
    expected = float((decoded - before).norm() / before.norm())
    assert errors["attention.weight"] == pytest.approx(expected, rel=1e-5) and errors["mlp.0.weight"] is None
    assert "error up to" in str(model.ciuic_report)
    for block, original in (
        (decoded[:64, :128], before[:64, :128]),
        (decoded[64:128, :128], before[64:128, :128]),
    ):
        assert int((block != 0).sum()) <= kept * 64 * 128
        dropped = original[block == 0].abs()
        assert dropped.quantile(0.99) <= original[block != 0].abs().min()  # 4 bits round a few to zero
    assert torch.isfinite(model(IDS)).all()


def test_a_hook_of_accelerate_survives() -> None:
    model = nn.Sequential(nn.Linear(160, 160))
    add_hook_to_module(model[0], AlignDevicesHook(execution_device="cpu"))
    x = torch.randn(3, 160)
    expected = model(x)
    apply_ciuic_compression(model, bits=8)
    assert model[0]._hf_hook is not None and (model(x) - expected).norm() / expected.norm() < 0.02


def test_forwards_that_were_replaced_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(160, 160), nn.Linear(160, 160), nn.Linear(160, 160))
    model[0].forward = lambda x: x * 2  # type: ignore[method-assign]
    prune.random_unstructured(model[1], "weight", 0.5)
    apply_ciuic_compression(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear, CiuicLinear]
    assert "its forward was replaced" in {k.reason for k in model.ciuic_report.kept}
    assert torch.isfinite(model(torch.randn(3, 160))).all()


def with_nan(model: Toy) -> Toy:
    model.lm_head.weight.data[7, 7] = float("nan")
    return model


def offloaded(model: Toy) -> Toy:
    model.mlp[0].to("meta")
    return model


def already(model: Toy) -> Toy:
    return apply_ciuic_compression(model)


def with_adapters(model: Toy) -> Any:
    peft = pytest.importorskip("peft", reason="the dev extra is not installed")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["attention"]))


def of_another_method(model: Toy) -> Toy:
    class Quantizer:
        quantization_config = type("Config", (), {"quant_method": "gptq"})()

    model.hf_quantizer = Quantizer()
    return model


BAD: dict[str, tuple[Callable[[Toy], Any], Any, str]] = {
    "nan": (with_nan, ARTICLE, r"embed.weight holds NaN .* \{\"embed.weight\": \"raw\"\}"),
    "meta": (offloaded, ARTICLE, "mlp.0.weight is not in memory"),
    "twice": (already, ARTICLE, "compressed by Ciuic already"),
    "adapters": (with_adapters, ARTICLE, "compress the model first"),
    "another method": (of_another_method, ARTICLE, r"quantized already \(gptq\)"),
    "float64": (lambda m: m.double(), ARTICLE, "convert the model"),
    "no module": (lambda m: 3, ARTICLE, "torch.nn.Module"),
    "nothing matches": (lambda m: m, {"decoder.": 4}, "matches no weight"),
    "everything is kept": (
        lambda m: m,
        {"linear": "raw", "experts": "raw", "embeddings": "raw"},
        "Nothing of this",
    ),
    "no linear": (lambda m: m.norm, None, "no Linear or experts"),
    "no such word": (lambda m: m, {"linear": "quant7"}, "quant6, quant8"),
    "too dense": (lambda m: m, {"attention": "sparse63"}, "keep 1 to 62 %"),
    "a wrong type": (lambda m: m, {"linear": None}, "must be bits per weight"),
    "a list": (lambda m: m, ["quant4"], "modules must map"),
    "fp16 codec": (lambda m: m, {"mlp": "raw_fp16"}, "float16 weights only"),
    "ties apart": (lambda m: m, {"embeddings": 8, "lm_head": 4}, "Give them the same"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_sentence_and_nothing_half_done(case: str, toy: Callable[..., Toy]) -> None:
    spoil, setting, says = BAD[case]
    model = spoil(toy())
    before = (
        {n: t.clone() for n, t in model.state_dict().items()}
        if case not in ("no module", "meta", "nan")
        else {}
    )
    with pytest.raises(CiuicError, match=says) as error:
        apply_ciuic_compression(model, setting)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    if before:
        assert unchanged(model, before)
    elif case != "no module":
        assert next(compressed_modules(model), None) is None


def test_a_pruned_model_keeps_more_of_itself_in_the_same_bytes(toy: Callable[..., Toy]) -> None:
    """By default; the uniform policy looks at no weights."""
    errors = {}
    for policy in ("rate-distortion", "uniform"):
        model = toy(tied=False)
        with torch.no_grad():
            for weight in (model.attention.weight, model.mlp[0].weight, model.experts.gate_up_proj):
                weight[weight.abs() < weight.abs().flatten().quantile(0.85)] = 0.0
        before = model.experts.gate_up_proj.detach().clone()
        apply_ciuic_compression(model, CiuicConfig(bits=3.5, policy=policy))
        decoded = model.experts.dequantize("gate_up_proj")
        errors[policy] = float((decoded - before).norm() / before.norm())
        codecs = {c for p in model.ciuic_report.compressed for c in p.codecs}
        assert any(name.startswith("sparse") for name in codecs) == (policy == "rate-distortion")
    assert errors["rate-distortion"] < 0.3 * errors["uniform"]
