"""What people do with any torch model: ``.to``, ``deepcopy``, ``compile``, gradients, LoRA."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ciuic_hf import CiuicExperts, CiuicLinear

FAMILIES = ["v3_fp8", "qwen2_tied"]


def arenas(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The compressed bytes of a model."""
    return {name: p for name, p in model.state_dict().items() if p.dtype == torch.uint8}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_to_dtype(
    family: str,
    dtype: torch.dtype,
    saved: Callable[[str], Path],
    load: Callable[..., Any],
    ids: torch.Tensor,
) -> None:
    model = load(saved(family))
    before = copy.deepcopy(arenas(model))
    model = model.to(dtype)
    after = arenas(model)
    assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())
    logits = model(ids).logits
    assert logits.dtype == dtype
    reference = load(saved(family), dtype=torch.float32)(ids).logits
    # A token at a tie of the router can go to another expert in another dtype, hence the median over tokens.
    error = (logits.float() - reference).norm(dim=-1) / reference.norm(dim=-1)
    assert error.median() < 0.02


def test_to_device(
    saved: Callable[[str], Path], load: Callable[..., Any], ids: torch.Tensor, device: Any
) -> None:
    model = load(saved("v3_fp8"))
    expected = model(ids).logits
    moved = model.to(device)
    assert all(p.device.type == device.type for p in moved.parameters())
    torch.testing.assert_close(moved(ids.to(device)).logits.cpu(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_deepcopy(
    family: str, saved: Callable[[str], Path], load: Callable[..., Any], ids: torch.Tensor
) -> None:
    model = load(saved(family))
    twin = copy.deepcopy(model)
    logits = model(ids).logits
    assert torch.equal(twin(ids).logits, logits)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(model(ids).logits, logits)
    if family == "qwen2_tied":
        assert twin.lm_head.weight is twin.model.embed_tokens.weight


def test_a_copy_saves_like_its_original(
    saved: Callable[[str], Path],
    load: Callable[..., Any],
    snapshot: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    model = load(saved("v3_fp8"))
    copy.deepcopy(model).save_pretrained(tmp_path / "a" / "model")
    model.save_pretrained(tmp_path / "b" / "model")
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


@pytest.mark.parametrize("grad", [False, True])
def test_compile_whole_graph(
    grad: bool, saved: Callable[[str], Path], load: Callable[..., Any], ids: torch.Tensor
) -> None:
    for family in FAMILIES:
        model = load(saved(family))
        with torch.set_grad_enabled(grad), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's tracer, about itself
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
        torch.compiler.reset()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_gradient_of_the_input(
    dtype: torch.dtype,
    bound: float,
    saved: Callable[[str], Path],
    load: Callable[..., Any],
    ids: torch.Tensor,
) -> None:
    for family in FAMILIES:
        model = load(saved(family), dtype=dtype)
        embeddings = model.get_input_embeddings()(ids).detach()
        gradients = []
        for one in (model, load(saved(family), dtype=dtype).dequantize()):
            x = embeddings.clone().requires_grad_()
            one(inputs_embeds=x, labels=ids).loss.backward()
            gradients.append(x.grad.float())
        assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < bound
        assert gradients[1].norm() > 0


def test_lora_trains_and_starts_where_the_model_is(
    saved: Callable[[str], Path], load: Callable[..., Any], ids: torch.Tensor, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="the dev extra is not installed")
    model = load(saved("v3_fp8"), dtype=torch.float32)
    logits = model(ids).logits.detach()
    before = copy.deepcopy(arenas(model))
    config = peft.LoraConfig(r=4, target_modules=["q_b_proj", "o_proj", "kv_b_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    assert isinstance(wrapped.base_model.model.model.layers[0].self_attn.o_proj.base_layer, CiuicLinear)
    assert torch.equal(wrapped(ids).logits, logits)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        loss = wrapped(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, tensor in before.items():
        (match,) = (p for n, p in arenas(wrapped).items() if n.replace(".base_layer", "").endswith(name))
        assert torch.equal(match, tensor)
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(saved("v3_fp8"), dtype=torch.float32), tmp_path)
    torch.testing.assert_close(again(ids).logits, wrapped(ids).logits)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_choice_of_experts_implementation_changes_nothing(
    implementation: str, saved: Callable[[str], Path], load: Callable[..., Any], ids: torch.Tensor
) -> None:
    model = load(saved("v3_fp8"))
    logits = model(ids).logits
    model.set_experts_implementation(implementation)
    assert isinstance(model.model.layers[1].mlp.experts, CiuicExperts)
    assert torch.equal(model(ids).logits, logits)
