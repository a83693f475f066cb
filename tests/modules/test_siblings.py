"""Linears with one input share a launch; whatever is different about an input or a caller, results stay right."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ciuic_hf.modules.linear import CiuicLinear
from ciuic_hf.modules.siblings import families, group_siblings
from tests.kernels.samples import packed_sample
from tests.triton.interpreted import gpu_kernels, needs_interpreter

pytestmark = needs_interpreter
HALF, WIDTH = torch.float16, 128
APART, TOGETHER = ["linear_kernel"] * 3, ["linears_kernel"]


class Attention(nn.Module):
    """Three projections of one tensor, side by side."""

    def __init__(self) -> None:
        super().__init__()
        for seed, name in enumerate(("q_proj", "k_proj", "v_proj")):
            packed = packed_sample((64, WIDTH), seed, ("grid4_g64",))
            self.add_module(name, CiuicLinear.from_packed(packed, torch.randn(64, dtype=HALF), dtype=HALF))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels that are started for linears; operators take the Triton kernels."""
    from ciuic_kernels.triton import linear, linears

    seen: list[str] = []
    for module in (linear, linears):

        def start(kernel: Any, *arguments: Any, _start: Any = module.start, **settings: Any) -> None:
            seen.append(kernel.fn.__name__)
            _start(kernel, *arguments, **settings)

        monkeypatch.setattr(module, "start", start)
    with gpu_kernels(), torch.no_grad():
        yield seen


@pytest.fixture
def model(launches: list[str]) -> Attention:
    """Grouped, and called once, so that the group is used from now on."""
    model = Attention().eval()
    assert group_siblings(model) == [("", ["q_proj", "k_proj", "v_proj"])]
    model(new_x())
    assert launches == APART
    launches.clear()
    return model


def new_x(tokens: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed)).to(HALF)


def apart(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([m.product(x) for m in model.children() if isinstance(m, CiuicLinear)], dim=-1)


def assert_right(model: nn.Module, x: Tensor, y: Tensor) -> None:
    torch.testing.assert_close(y, apart(model, x), atol=0.02, rtol=0.01)


def test_one_launch_and_the_results_of_three(model: Attention, launches: list[str]) -> None:
    for seed in range(3):
        x = new_x(seed=seed)
        y = model(x)
        assert launches == TOGETHER
        assert_right(model, x, y)
        launches.clear()


def test_many_tokens_are_multiplied_apart(model: Attention, launches: list[str]) -> None:
    model(new_x(33))
    assert launches == APART
    launches.clear()
    model(new_x(32))
    assert launches == TOGETHER


def test_an_input_that_was_written_to(model: Attention) -> None:
    x = new_x()
    q = model.q_proj(x)
    x.mul_(2)
    torch.testing.assert_close(model.k_proj(x), model.k_proj.product(x))
    torch.testing.assert_close(q * 2, model.q_proj.product(x) + model.q_proj.bias, atol=0.05, rtol=0.01)


def test_another_input_for_a_sibling(model: Attention, launches: list[str]) -> None:
    """As in cross-attention: right at once, and not computed for nothing again."""
    x, other = new_x(seed=1), new_x(seed=2)
    for _ in range(4):
        for name in ("q_proj", "k_proj", "v_proj"):
            linear, given = getattr(model, name), x if name == "q_proj" else other
            torch.testing.assert_close(linear(given), linear.product(given), atol=0.02, rtol=0.01)
    assert launches.count("linears_kernel") == 1


def test_results_that_nobody_took_die_with_the_input(model: Attention) -> None:
    x = new_x()
    model.q_proj(x)
    siblings, _ = model.q_proj._siblings
    outputs = siblings._here.round.outputs
    assert len(outputs) == 2
    del x
    assert not outputs


@pytest.mark.parametrize("change", ["blocks", "bytes", "bias", "new bias", "state"])
def test_a_weight_that_changes_between_siblings(model: Attention, change: str) -> None:
    x, k = new_x(), model.k_proj
    model.q_proj(x)
    other = packed_sample((64, WIDTH), 9, ("grid4_g64",))
    if change == "blocks":
        k.replace_bytes("weight", other)
    elif change == "bytes":
        k.weight.copy_(other.arena)
    elif change == "bias":
        k.bias.mul_(3)
    elif change == "new bias":
        k.bias = nn.Parameter(k.bias * 3)
    else:
        k.load_state_dict(k.state_dict() | {"weight": other.arena, "weight_tags": other.tags})
    assert torch.equal(k(x), k.product(x))


def test_replaced_blocks_are_multiplied_with_their_own_exponents(launches: list[str]) -> None:
    """A work table holds the exponents of the tags."""
    linear = CiuicLinear.from_packed(packed_sample((64, WIDTH), 1, ("grid4_g64",)), dtype=HALF)
    x, before = new_x(), linear(new_x())
    packed = linear.packed("weight")
    packed.tags[..., 1] += 1
    linear.replace_bytes("weight", packed)
    assert not torch.equal(linear(x), before)
    torch.testing.assert_close(
        linear(x).float(), x.float() @ linear.dequantize("weight").float().t(), atol=0.1, rtol=0.01
    )


@pytest.mark.parametrize(
    "why", ["gradient of x", "gradient of a bias", "training", "inference tensor", "subclass"]
)
def test_what_is_never_grouped(model: Attention, launches: list[str], why: str) -> None:
    x = new_x()
    if why == "training":
        model.train()
    with torch.set_grad_enabled(why.startswith("gradient")), torch.inference_mode(why == "inference tensor"):
        x = x + 0
        if why == "subclass":
            x = nn.Parameter(x, requires_grad=False)
        if why != "gradient of a bias":
            for module in model.children():
                module.bias.requires_grad_(False)
        y = model(x.requires_grad_() if why == "gradient of x" else x)
    assert launches == APART
    if why == "gradient of x":
        y.backward(torch.ones_like(y))
        assert x.grad is not None


def test_a_gradient_asked_for_between_siblings(model: Attention) -> None:
    x = new_x()
    model.q_proj(x)
    with torch.enable_grad():
        assert model.k_proj(x.requires_grad_()).requires_grad


def test_threads_have_rounds_of_their_own(model: Attention) -> None:
    ready, results = threading.Barrier(2), {}

    def run(seed: int) -> None:
        with torch.no_grad():
            x = new_x(seed=seed)
            parts = []
            for linear in model.children():
                ready.wait(20)
                with lock:  # the interpreter runs one kernel at a time
                    parts.append(linear(x))
            results[seed] = torch.cat(parts, dim=-1)

    lock = threading.Lock()
    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        assert_right(model, new_x(seed=seed), results[seed])


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_a_group_of_its_own(model: Attention, launches: list[str], how: str) -> None:
    x = new_x()
    model.q_proj(x)  # a round is open; it is nobody else's
    twin = copy.deepcopy(model) if how == "deepcopy" else pickled(model)
    assert twin.q_proj._siblings[0] is twin.v_proj._siblings[0] is not model.q_proj._siblings[0]
    twin.k_proj.bias.zero_()
    launches.clear()
    for expected in (APART, TOGETHER):
        assert_right(twin, x, twin(x))
        assert launches[: len(expected)] == expected
        launches.clear()
    assert_right(model, x, model(x))


def pickled(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_parts_that_left_the_model(model: Attention, launches: list[str]) -> None:
    alone = copy.deepcopy(model.k_proj)
    replica = model.q_proj._replicate_for_data_parallel()
    replica._parameters = dict(model.q_proj._parameters)
    x = new_x()
    torch.testing.assert_close(alone(x), model.k_proj.product(x))
    torch.testing.assert_close(replica(x), model.q_proj.product(x))
    model.v_proj = nn.Linear(WIDTH, 64, dtype=HALF)
    launches.clear()
    for _ in range(2):
        model(x)
    assert "linears_kernel" not in launches


def test_nothing_of_a_group_is_saved(model: Attention) -> None:
    model.q_proj(new_x())
    grouped = set(model.state_dict())
    assert grouped == set(Attention().state_dict())
    model.q_proj.restore(HALF)
    assert "_siblings" not in vars(model.q_proj)


def test_dispatchers_hooks_keep_the_group(model: Attention, launches: list[str]) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for linear in model.children():
        add_hook_to_module(linear, AlignDevicesHook(execution_device="cpu"))
    x = new_x()
    assert_right(model, x, model(x))
    assert launches[:1] == TOGETHER


def test_families_by_name_and_width() -> None:
    mla = dict.fromkeys(("a.q_a_proj", "a.kv_a_proj_with_mqa", "a.indexer.wk"), 64)
    mla |= {"a.q_b_proj": 32, "a.indexer.wq_b": 32, "a.o_proj": 64}
    assert families(mla) == [
        ("a.", ["q_a_proj", "kv_a_proj_with_mqa", "indexer.wk"]),
        ("a.", ["q_b_proj", "indexer.wq_b"]),
    ]
    assert families({"q_proj": 64, "kv_a_proj_with_mqa": 64}) == [("", ["q_proj", "kv_a_proj_with_mqa"])]
    assert families({"b.gate_proj": 64, "b.up_proj": 32, "c.up_proj": 64}) == []
    assert families({}) == []


def test_vmap_multiplies_apart(model: Attention, launches: list[str]) -> None:
    x = new_x()
    assert_right(model, x, torch.vmap(model)(x))
    assert "linears_kernel" not in launches


def test_the_pass_calls_one_that_was_there_before() -> None:
    from torch._inductor import config

    from ciuic_kernels.inductor import MergeLinears, install

    seen: list[torch.fx.Graph] = []
    with config.patch(post_grad_custom_pre_pass=seen.append):
        install()
        install()
        installed = config.post_grad_custom_pre_pass
        assert isinstance(installed, MergeLinears) and installed.earlier == seen.append
        installed(graph := torch.fx.Graph())
        assert seen == [graph]
        assert installed.uuid() is None
    assert MergeLinears().uuid() is not None


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # Inductor imports what torch deprecates
def test_inductor_merges_what_has_the_same_input(launches: list[str]) -> None:
    """Whatever the modules are called, without a graph break; an input written to in between is another one."""
    from torch._inductor import config

    from ciuic_kernels.inductor import MergeLinears

    model = Attention().eval()

    def twice(x: Tensor) -> Tensor:
        x = x + 1
        first = model(x)
        x.mul_(2)
        return torch.cat([first, model.k_proj(x)], dim=-1)

    torch._dynamo.reset()
    x = new_x()
    expected = twice(x)
    launches.clear()
    with config.patch(post_grad_custom_pre_pass=MergeLinears()):
        y = torch.compile(twice, fullgraph=True)(x)
    assert launches == ["linears_kernel", "linear_kernel"]
    torch.testing.assert_close(y, expected, atol=0.02, rtol=0.01)
