"""A constructed CiuicLinear: full weights in training mode, compressed ones in eval mode, back and forth."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from ciuic_hf import CiuicError, CiuicLinear, apply_ciuic_compression
from ciuic_hf.memory import anonymous_nbytes
from ciuic_hf.modules.swap import compressed_modules

SHAPES = [(160, 300), (64, 128), (1, 200), (257, 65)]


def linear(cols: int = 160, rows: int = 300, **options: Any) -> CiuicLinear:
    torch.manual_seed(0)
    return CiuicLinear(cols, rows, **options)


def nbytes(module: nn.Module) -> int:
    tensors = [*module.parameters(), *(p.grad for p in module.parameters() if p.grad is not None)]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_training_mode_is_nn_linear(rows: int, cols: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(cols, rows, bias, dtype=dtype)
    module = linear(cols, rows, bias=bias, dtype=dtype)
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {
        n: tuple(p.shape) for n, p in plain.named_parameters()
    }
    module.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, cols, dtype=dtype)
    gradients = []
    for layer in (plain, module):
        given = x.clone().requires_grad_()
        layer(given).square().sum().backward()
        gradients.append([given.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("setting", [4.25, 8, "quant3", "adaptive"])
def test_eval_mode_holds_compressed_bytes_only(rows: int, cols: int, setting: Any) -> None:
    module = linear(cols, rows, setting=setting)
    module(torch.randn(5, cols)).sum().backward()
    full = module.weight.detach().clone()
    module.eval()
    assert module.is_compressed and module.weight.dtype == torch.uint8 and module.weight.grad is None
    assert nbytes(module) < 0.4 * full.nbytes + 2 * full.shape[0] * 4 + 32
    decoded = module.dequantize("weight")
    assert (decoded - full).norm() / full.norm() < 0.2
    x = torch.randn(5, cols)
    torch.testing.assert_close(module(x), nn.functional.linear(x, decoded, module.bias), atol=1e-4, rtol=1e-4)


def test_the_full_weight_is_freed() -> None:
    module = linear(2048, 4096)  # 32 MiB
    module.eval()
    start = anonymous_nbytes()
    if start is None:
        pytest.skip("the system does not tell the memory of a process")
    for _ in range(8):
        module.train()
        module.eval()
    assert (anonymous_nbytes() or 0) - start < 48 << 20
    module.train()
    assert set(dict(module.named_parameters())) == {"weight", "bias"} and module._derived == {}


@pytest.mark.parametrize("setting", [2.5, 4.25, 6, 8, "grid4_g64", "raw_bf16", "adaptive"])
def test_switching_without_training_changes_nothing(setting: Any) -> None:
    """Encoding decoded values anew would round them once more."""
    module = linear(setting=setting).eval()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    for _ in range(3):
        assert module.train().weight.requires_grad
        module.eval()
    assert all(torch.equal(t, module.state_dict()[name]) for name, t in before.items())
    assert module.eval() is module and module.train().train().weight.shape == (300, 160)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_goes_on_after_eval(optimizer: Any) -> None:
    module, twin = linear(setting=8), linear(setting=8)
    options = {"lr": 0.01} | ({"momentum": 0.9} if optimizer is torch.optim.SGD else {})
    steps = [optimizer(m.parameters(), **options) for m in (module, twin)]
    x, y = torch.randn(64, 160), torch.randn(64, 300)
    parameter, losses = module.weight, []
    for _ in range(6):
        for layer, step in zip((module, twin), steps, strict=True):
            loss = (layer.train()(x) - y).square().mean()
            step.zero_grad()
            loss.backward()
            step.step()
        losses.append(loss.item())
        module.eval()
        steps[0].step()  # nothing to do: there is no gradient
        assert module.weight is parameter
    module.train()
    assert losses[-1] < losses[0] and module.weight is parameter
    state = steps[0].state[parameter]
    assert all(t.shape == (300, 160) for t in state.values() if isinstance(t, torch.Tensor) and t.dim() == 2)
    assert (
        module.weight - twin.weight
    ).norm() / twin.weight.norm() < 0.05  # eval rounds, at 8 bits, six times


def test_a_copy_is_evaluated_without_rounding_the_original() -> None:
    module = linear(setting=3.2)
    before = module.weight.detach().clone()
    assert copy.deepcopy(module).eval().is_compressed
    assert torch.equal(module.weight, before) and module.weight.requires_grad


def test_a_frozen_weight_stays_frozen() -> None:
    module = linear()
    module.weight.requires_grad_(False)
    assert not module.eval().train().weight.requires_grad
    module.weight.requires_grad_(True)
    assert module.eval().train().weight.requires_grad


def test_gradients_reach_the_input_in_eval_mode() -> None:
    module = linear().eval()
    x = torch.randn(4, 160, requires_grad=True)
    module(x).sum().backward()
    expected = module.dequantize("weight").sum(0).expand(4, -1)
    torch.testing.assert_close(x.grad, expected, atol=1e-4, rtol=1e-4)
    assert module.weight.grad is None and module.bias.grad is not None


@pytest.mark.parametrize("saved_in", ["train", "eval"])
@pytest.mark.parametrize("loaded_in", ["train", "eval"])
@pytest.mark.parametrize("setting", [3.5, 8])
def test_state_dicts_of_either_mode_load_in_either(saved_in: str, loaded_in: str, setting: float) -> None:
    source = nn.Sequential(linear(setting=8)).train(saved_in == "train")
    torch.manual_seed(1)
    target = nn.Sequential(CiuicLinear(160, 300, setting=setting)).train(loaded_in == "train")
    saved = source.state_dict()
    names = set(saved)
    target.load_state_dict(saved)
    assert set(saved) == names and target[0].is_compressed == (loaded_in == "eval")
    x = torch.randn(3, 160)
    expected = source.eval()(x)
    bound = 0.25 if setting == 3.5 and saved_in == "train" else 0.02
    for mode in (loaded_in == "train", False, True):
        found = target.train(mode)(x)
        assert (found - expected).norm() / expected.norm() < bound
    if saved_in == "eval" and loaded_in == "eval":
        again = nn.Sequential(CiuicLinear(160, 300, setting=setting)).eval()
        again.load_state_dict(saved)
        assert torch.equal(again(x), expected)


def test_damaged_state_is_refused() -> None:
    state = linear().eval().state_dict()
    state["weight_tags"] = torch.full_like(state["weight_tags"], 255)
    with pytest.raises(RuntimeError, match=r"weight: .*scale exponent"):
        linear().load_state_dict(state)


@pytest.mark.parametrize("mode", [True, False])
def test_moving_copying_pickling(mode: bool) -> None:
    module = linear(setting=8).train(mode)
    x = torch.randn(3, 160)
    expected = module(x)
    assert torch.equal(copy.deepcopy(module)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), expected)
    half = copy.deepcopy(module).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert half.train(not mode)(x.bfloat16()).dtype == torch.bfloat16
    assert half.train().weight.dtype == torch.bfloat16
    torch.testing.assert_close(half.eval()(x.bfloat16()).float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("mode", [True, False])
def test_compiling(mode: bool) -> None:
    module, x = linear().train(mode), torch.randn(20, 160)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's tracer, about itself
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), module(x))
        module.train(not mode)
        torch.testing.assert_close(compiled(x), module(x))
    torch.compiler.reset()


def test_on_meta() -> None:
    with torch.device("meta"):
        module = CiuicLinear(160, 300).eval()
    assert module.weight.device.type == "meta" and module.weight.shape == linear().eval().weight.shape
    assert module.train().weight.shape == (300, 160)


def test_lora_on_either_kind() -> None:
    peft = pytest.importorskip("peft", reason="the dev extra is not installed")
    compressed = apply_ciuic_compression(nn.Sequential(nn.Linear(160, 300)))
    for model in (compressed, nn.Sequential(linear())):
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"])).train()
        wrapped(torch.randn(3, 160)).sum().backward()
        trained = [n for n, p in wrapped.named_parameters() if p.grad is not None]
        assert trained and all("lora" in name for name in trained)


def test_a_compressed_model_is_not_inflated_by_training_mode() -> None:
    model = apply_ciuic_compression(nn.Sequential(nn.Linear(160, 300), nn.Linear(300, 160)))
    before = nbytes(model)
    assert nbytes(model.train()) == before == nbytes(model.eval())
    assert len(list(compressed_modules(model))) == 2


def test_bad_arguments_and_weights() -> None:
    for setting, says in [
        ("raw", "nn.Linear"),
        (16, "nn.Linear"),
        ("quant7", "setting is 'quant7'; give bits per weight .* No codec is named 'quant7'"),
        (0, "between"),
    ]:
        with pytest.raises(CiuicError, match=says):
            CiuicLinear(160, 300, setting=setting)
    with pytest.raises(CiuicError, match="float64"):
        CiuicLinear(160, 300, dtype=torch.float64)
    with pytest.raises(CiuicError, match="its tags alone"):
        CiuicLinear(2, 1)
    module = linear()
    module.weight.data[3, 3] = float("inf")
    with pytest.raises(CiuicError, match="training diverged"):
        module.eval()
    assert module.training and not module.is_compressed and module.weight.requires_grad
