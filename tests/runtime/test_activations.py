"""compress_activations: what is packed, what is exact, what is shared, and that training does not notice."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ciuic_hf import CiuicError, compress_activations
from ciuic_hf.runtime.activations import ActivationCompression
from ciuic_hf.runtime.packing import stored_nbytes


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, checkpointed: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(64, 32)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            plain = self.checkpointed is None
            x = block(x) if plain else checkpoint(block, x, use_reentrant=self.checkpointed)
        return nn.functional.cross_entropy(self.head(x), torch.arange(len(x)) % 32)


def data() -> Tensor:
    return torch.randn(128, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()


def gradients(
    model: nn.Module, call: Callable[[], Tensor] | None = None, saved: ActivationCompression | None = None
) -> Tensor:
    """All gradients of the weights, flat."""
    model.zero_grad()
    x = data()
    if saved is None:
        (call() if call else model(x)).backward()
    else:
        with saved:
            (call() if call else model(x)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize(("bits", "most", "ratio"), [(8, 0.02, 3.8), (4, 0.3, 7.0), (2, 1.5, 10.0)])
def test_gradients_are_near_and_bytes_are_few(bits: int, most: float, ratio: float) -> None:
    model = Model()
    saved = compress_activations(bits=bits)
    error = relative(gradients(model, saved=saved), gradients(model))
    assert 0 < error < most
    assert saved.ratio > ratio
    assert not saved.nonfinite


def test_the_noise_averages_out() -> None:
    model = Model()
    exact = gradients(model)
    draws = [gradients(model, saved=compress_activations(bits=4, seed=seed)) for seed in range(32)]
    one = sum(relative(draw, exact) for draw in draws) / 32
    # unbiased noise leaves 1/sqrt(32) of itself
    assert relative(torch.stack(draws).mean(0), exact) < 1.2 * one / 32**0.5


def test_the_original_bytes_are_those_that_autograd_holds() -> None:
    model, storages = Model(), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model(data())
    held = sum(storage.nbytes() for storage in storages.values())
    saved = compress_activations(bits=8)
    with saved:
        again = model(data())
    assert saved.original_nbytes == held
    del loss, again


def test_what_is_saved_by_several_is_stored_once() -> None:
    x = torch.randn(64, 64, requires_grad=True) * 1
    weights = [nn.Parameter(torch.randn(64, 64)) for _ in range(3)]
    with compress_activations(bits=8) as saved:
        outputs = [nn.functional.linear(x, weight) for weight in weights]
        outputs.append(x.view(32, 128) @ torch.randn(128, 2, requires_grad=True))
        outputs.append(x.t().exp().sum()[None] * 0 + (x.t() ** 2).sum())
    first = stored_nbytes((64, 64), 8)
    # x; its exponential; the small ones exactly
    assert saved.stored_nbytes - 2 * first < 3000
    sum(output.sum() for output in outputs).backward()
    x = torch.randn(64, 64, requires_grad=True) * 1
    with compress_activations(bits=8) as saved:
        (x**2).sum()
        x.add_(1)  # another tensor now, though in the same place
        (x**2).sum()
    assert saved.stored_nbytes == 2 * first


def test_weights_their_views_and_casts_stay_exact() -> None:
    weight, x = nn.Parameter(torch.randn(64, 64)), torch.randn(64, 64, requires_grad=True)
    forms: list[Callable[[], Tensor]] = [
        lambda: weight,
        lambda: weight.t(),
        lambda: weight.double().float(),
        lambda: weight.view(2, 32, 64)[1],
        lambda: weight.t().contiguous(),
        lambda: weight[:32],
    ]
    for form in forms:
        x.grad = None
        with compress_activations(bits=2) as saved:
            nn.functional.linear(x, form()).sum().backward()
        assert torch.equal(x.grad, torch.ones(64, len(form())) @ form())
        assert saved.original_nbytes == x.nbytes


def test_integers_masks_small_tensors_and_doubles_stay_exact() -> None:
    x = torch.randn(100, 64, requires_grad=True)
    index, mask = torch.randint(0, 100, (5000,)), torch.rand(100, 64) > 0.5
    expected = torch.autograd.grad(x.masked_fill(mask, 0)[index].sum(), x)[0]
    with compress_activations(bits=2):
        assert torch.equal(torch.autograd.grad(x.masked_fill(mask, 0)[index].sum(), x)[0], expected)
        doubles = torch.randn(2000, dtype=torch.float64, requires_grad=True)
        assert torch.equal(torch.autograd.grad((doubles**2).sum(), doubles)[0], 2 * doubles)
        small = torch.randn(1023, requires_grad=True)
        assert torch.equal(torch.autograd.grad((small**2).sum(), small)[0], 2 * small)
    with compress_activations(bits=2, min_numel=1000):
        assert not torch.equal(torch.autograd.grad((small**2).sum(), small)[0], 2 * small)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x.permute(2, 0, 1),
        lambda x: x[:, ::2],
        lambda x: x[3:, :, 5:],
        lambda x: x[:, :1].expand(-1, 50, -1),
        lambda x: x.t() if x.dim() == 2 else x[..., None].expand(-1, -1, -1, 2),
    ],
)
def test_views_come_back_as_they_were(view: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(30, 20, 40, requires_grad=True)
    # exact for a view of which every value is 1 or 2
    y = (x.detach() > 0).float().add(1).requires_grad_()
    with compress_activations(bits=8):
        got = torch.autograd.grad((view(y) ** 2).sum(), y)[0]
    expected = torch.autograd.grad((view(y) ** 2).sum(), y)[0]
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0)


def test_what_changed_in_place_is_refused_as_without() -> None:
    x = torch.randn(100, requires_grad=True) * 1
    with compress_activations():
        loss = (x**2).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        loss.backward()


def test_nan_and_infinity_are_kept_named_and_told_once() -> None:
    model = Model()
    with torch.no_grad():
        model.blocks[1].up.bias[5] = float("inf")
    saved = compress_activations(bits=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = gradients(model, saved=saved)
    assert "blocks.1" in saved.nonfinite and saved.nonfinite["blocks.1"] >= 1
    assert not any(name.startswith("blocks.0") for name in saved.nonfinite)
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == len(saved.nonfinite) == len(set(texts))
    assert torch.equal(got.isfinite(), gradients(model).isfinite())


def test_a_log_probability_of_minus_infinity_is_no_loss_of_the_step() -> None:
    logits = torch.randn(64, 64, requires_grad=True)
    masked = logits.masked_fill(torch.eye(64, dtype=torch.bool), -float("inf"))
    targets = (torch.arange(64) + 1) % 64
    expected = torch.autograd.grad(nn.functional.cross_entropy(masked, targets), logits, retain_graph=True)[0]
    with compress_activations() as saved:
        got = torch.autograd.grad(nn.functional.cross_entropy(masked, targets), logits, retain_graph=True)[0]
    assert (got.diagonal() == 0).all() and got.isfinite().all() and not saved.nonfinite
    assert relative(got, expected) < 0.1
    with pytest.warns(RuntimeWarning, match="outside of any module"), compress_activations() as saved:
        got = torch.autograd.grad(masked.exp().sum() + (masked**2).clamp_max(9).sum(), logits)[0]
    assert saved.nonfinite


@pytest.mark.parametrize("loss", [nn.functional.cross_entropy, nn.functional.log_softmax])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_gradient_of_logarithms_is_unbiased(loss: Callable[..., Tensor], bits: int) -> None:
    logits = (3 * torch.randn(40, 300, generator=torch.Generator().manual_seed(0))).requires_grad_()
    targets, weights = torch.arange(40), torch.randn(40, 300, generator=torch.Generator().manual_seed(1))

    def gradient() -> Tensor:
        if loss is nn.functional.cross_entropy:
            return torch.autograd.grad(loss(logits, targets), logits)[0]
        return torch.autograd.grad(loss(logits, dim=-1), logits, weights)[0]

    exact, draws = gradient(), []
    for seed in range(64):
        with compress_activations(bits=bits, seed=seed) as saved:
            draws.append(gradient())
    assert saved.stored_nbytes < 40 * 300 * max(bits, 4) / 8 * 1.1 + exact.nbytes
    one = sum(relative(draw, exact) for draw in draws) / 64
    assert 0 < one < 0.12
    assert relative(torch.stack(draws).mean(0), exact) < 1.2 * one / 8


def test_a_target_that_learns_is_given_the_logarithms() -> None:
    logits = torch.randn(40, 300)
    target = torch.rand(40, 300).requires_grad_()
    expected = torch.autograd.grad(nn.functional.cross_entropy(logits, target), target)[0]
    logits.requires_grad_()
    with compress_activations(bits=4):
        got = torch.autograd.grad(nn.functional.cross_entropy(logits, target), target)[0]
    assert relative(got, expected) < 0.02


def test_zeros_of_relu_stay_zeros_and_nothing_positive_turns_negative() -> None:
    x = torch.randn(64, 256, requires_grad=True)
    with compress_activations(bits=4):
        passed = torch.autograd.grad(x.relu().sum(), x)[0]
        assert (passed[x < 0] == 0).all()
        positive = (x.detach().abs() + 0.01).requires_grad_()
        assert (torch.autograd.grad(positive.sqrt().sum(), positive)[0] > 0).all()


def test_statistics_of_norms_and_attention_get_eight_bits() -> None:
    x = torch.randn(4, 2, 600, 16, requires_grad=True)
    with compress_activations(bits=2) as saved:
        torch.rand(1200, 1, requires_grad=True).rsqrt()
    assert saved.stored_nbytes == stored_nbytes((1200, 1), 8)
    with compress_activations(bits=4) as saved:
        nn.functional.scaled_dot_product_attention(x, x, x)
    rows = stored_nbytes((4, 2, 600), 8)
    assert saved.stored_nbytes <= 2 * stored_nbytes(tuple(x.shape), 4) + rows + 64


def test_buffers_of_the_layer_stay_exact_and_are_not_counted() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.randn(64, 64))
            self.register_buffer("order", torch.arange(4096) % 64)

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale).flatten()[self.order].sum()

    x, layer = torch.randn(64, 64, requires_grad=True), Scaled()
    with compress_activations(bits=2) as saved:
        got = torch.autograd.grad(layer(x), x)[0]
    assert torch.equal(got, torch.autograd.grad(layer(x), x)[0])
    assert saved.original_nbytes == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_around_a_compiled_model() -> None:
    model = Model()
    exact = gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    saved = compress_activations(bits=8)
    got = gradients(model, lambda: compiled(data()), saved)
    assert 0 < relative(got, exact) < 0.05
    assert saved.ratio > 2
    with pytest.raises(CiuicError, match="compiled model"):
        compress_activations(compiled)
    torch._dynamo.reset()


def test_dropout_draws_what_it_would_have_drawn_and_runs_repeat() -> None:
    model, drop = Model(), nn.Dropout(0.5)

    def loss() -> Tensor:
        torch.manual_seed(5)
        return model(drop(data()))

    plain = loss()
    with compress_activations(bits=4):
        assert torch.equal(loss(), plain)
        assert torch.rand(()) == (loss(), torch.rand(()))[1]
    first, second = (gradients(model, loss, compress_activations(bits=4, seed=7)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, gradients(model, loss, compress_activations(bits=4, seed=8)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(reentrant: bool) -> None:
    model = Model(checkpointed=reentrant)
    saved = compress_activations(bits=8)
    assert 0 < relative(gradients(model, saved=saved), gradients(model)) < 0.02
    assert saved.ratio > 3


def test_with_autocast_frozen_weights_stay_exact() -> None:
    model, x = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)), data()
    model.requires_grad_(False)
    for trained in (False, True):
        model.requires_grad_(trained)
        with torch.autocast("cpu", torch.bfloat16):
            expected = torch.autograd.grad(model(x).sum(), x)[0]
            with compress_activations(bits=2) as saved:
                got = torch.autograd.grad(model(x).sum(), x)[0]
        assert torch.equal(got, expected)
        assert (saved.original_nbytes > 0) == trained


def test_a_graph_can_be_walked_twice_and_differentiated_twice() -> None:
    model, x = Model(), data()
    with compress_activations(bits=4):
        loss = model(x)
        first = torch.autograd.grad(loss, x, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(loss, x, retain_graph=True)[0], first)
        again = torch.autograd.grad(loss, x, create_graph=True)[0]
        assert torch.autograd.grad(again.square().sum(), x)[0].isfinite().all()


def test_nothing_outlives_its_graph() -> None:
    model = Model()
    with compress_activations(bits=4) as saved:
        loss = model(data())
        stored = [entry[1]() for entry in saved._register.values() if entry[1] is not None]
        alive = [weakref.ref(one) for one in stored if one is not None]
        del stored
        assert len(alive) > 5
        gc.disable()  # there must be no cycle to collect
        try:
            del loss
            assert all(one() is None for one in alive)
        finally:
            gc.enable()
        for _ in range(100):
            model(data())
        assert len(saved._register) <= saved._register_limit < 1024


def test_on_a_model_until_removed() -> None:
    model = Model()
    exact = gradients(model)
    saved = compress_activations(model, bits=4)
    assert relative(gradients(model), exact) > 0.01
    with pytest.raises(RuntimeError, match="shape"):
        model(torch.randn(4, 7))  # leaves no hook behind
    loss = model(data())
    saved.remove()
    loss.backward()
    before = saved.original_nbytes
    assert torch.equal(gradients(model), exact)
    assert saved.original_nbytes == before > 0
    saved.reset()
    assert saved.original_nbytes == saved.stored_nbytes == 0 and saved.ratio == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "8, 4 or 2 bits"),
        ({"bits": True}, "8, 4 or 2 bits"),
        ({"min_numel": 0}, "1 or more"),
        ({"model": 4}, "bits=4"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(CiuicError, match=message):
        compress_activations(**settings)  # type: ignore[arg-type]
