"""Operators are good citizens of torch.library: schema, fake, autograd and compilation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

from ciuic_kernels import ops
from tests.kernels.operands import activations, operand, together
from tests.triton.pages import pages_of

MATRIX, EXPERTS = (70, 300), (4, 70, 300)


def calls() -> dict[str, tuple[Any, ...]]:
    """Arguments for every operator, by its name in torch.ops.ciuic, with variants after a dash."""
    w, e = operand(MATRIX), operand(EXPERTS)
    ids = torch.tensor([[0, 3], [4, 1], [2, 2]])
    x, many = activations(3, w.cols), activations(2, 20, w.cols)
    bias, grad = activations(w.rows), activations(3, w.rows)
    three = [operand(shape) for shape in ((5, 300), MATRIX, (129, 300))]
    several = (*together(three), [], [False] * 3, [o.rows for o in three], w.cols)
    one_bias = [activations(w.rows, seed=2).requires_grad_()]
    biased = (*together(three), one_bias, [False, True, False], [o.rows for o in three], w.cols)
    heads, latents = pages_of(4, False, [(64, 64)], 1, (24, 16)), pages_of(3, True, [(9, 128)], 1, (24, 16))
    query, mask = activations(2, 3 * 2 * 24).view(2, 3, 2, 24), torch.rand(2, 1, 64) < 0.5
    a, b = activations(4, 2, w.cols).requires_grad_(), activations(4, 7, 2).requires_grad_()
    return {
        "linear": (x, *w.stored, None, w.rows, w.cols),
        "linear-bias": (x.clone().requires_grad_(), *w.stored, bias.requires_grad_(), w.rows, w.cols),
        "linear-many": (many.requires_grad_(), *w.stored, None, w.rows, w.cols),
        "linear-bfloat16": (x.bfloat16(), *w.stored, None, w.rows, w.cols),
        "linear-empty": (x[:0], *w.stored, None, w.rows, w.cols),
        "linears": (x, *several),
        "linears-grad": (x.clone().requires_grad_(), *biased),
        "linears-empty": (x[:0], *several),
        "attend_packed": (query, None, *heads.arguments, mask, 0.2, *heads.codes, 16),
        "attend_packed-latents": (query, query[..., :16], *latents.arguments, None, 0.2, *latents.codes, 24),
        "linear_backward": (grad, *w.stored, w.cols),
        "expert_linear": (x, ids, *e.stored, e.rows, e.cols),
        "expert_linear-grad": (x.clone().requires_grad_(), ids, *e.stored, e.rows, e.cols),
        "expert_linear_backward": (activations(6, e.rows), ids, *e.stored, e.cols, 3),
        "expert_low_rank": (x, ids, a.detach(), b.detach(), 2.0),
        "expert_low_rank-grad": (x.clone().requires_grad_(), ids, a, b, 2.0),
        "expert_low_rank_backward": (activations(6, 7), x, ids, a.detach(), b.detach(), 2.0),
        "embedding": (torch.tensor([[0, 69, 5]]), *w.stored, w.rows, w.cols, torch.float32),
        "embedding-bfloat16": (torch.tensor(7), *w.stored, w.rows, w.cols, torch.bfloat16),
        "dequantize": (*w.stored, w.rows, w.cols, torch.float16),
        "dequantize-experts": (*e.stored, e.rows, e.cols, torch.float32),
    }


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("call", calls())
def test_opcheck(call: str) -> None:
    operator = getattr(torch.ops.ciuic, call.partition("-")[0]).default
    results = torch.library.opcheck(operator, calls()[call])
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("call", calls())
def test_the_fake_agrees(call: str) -> None:
    """Shape, dtype and strides without computing anything."""
    operator, arguments = getattr(torch.ops.ciuic, call.partition("-")[0]).default, calls()[call]
    real = operator(*arguments)
    meta = tree_map_only(torch.Tensor, lambda a: a.to("meta"), list(arguments))
    fake = operator(*meta)
    several = isinstance(real, tuple | list)
    for one, other in zip(fake if several else [fake], real if several else [real], strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def test_every_operator_is_checked() -> None:
    """Each file of ops/ is imported and defines an operator of its own name or more; all are in ``calls``."""
    files = {path.stem for path in Path(ops.__file__).parent.glob("*.py") if not path.stem.startswith("_")}
    assert files == {
        "attend_packed",
        "linear",
        "linears",
        "experts",
        "expert_low_rank",
        "embedding",
        "dequantize",
    }, "add a new operator to calls()"
    checked = {call.partition("-")[0] for call in calls()}
    defined = {
        name.removeprefix("ciuic::") for name in torch._C._dispatch_get_all_op_names() if "ciuic::" in name
    }
    assert defined == checked


def compilable(name: str) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]]:
    w, e = operand(MATRIX), operand(EXPERTS)
    ids = torch.tensor([[0, 3], [4, 1], [2, 2]])
    if name == "linear":
        bias = activations(w.rows, seed=2)
        return lambda x: ops.linear(x * 2, *w.stored, bias, w.rows, w.cols).relu(), (activations(3, w.cols),)
    if name == "expert_linear":
        return lambda x: ops.expert_linear(x * 2, ids, *e.stored, e.rows, e.cols).relu(), (
            activations(3, e.cols),
        )
    if name == "expert_low_rank":
        a, b = activations(4, 2, e.cols), activations(4, 7, 2)
        return lambda x: ops.expert_low_rank(x * 2, ids, a, b, 2.0).relu(), (activations(3, e.cols),)
    if name == "embedding":
        return lambda t: ops.embedding(t, *w.stored, w.rows, w.cols, torch.bfloat16) * 2, (torch.arange(4),)
    return lambda x: x @ ops.dequantize(*w.stored, w.rows, w.cols, torch.float32).t(), (
        activations(3, w.cols),
    )


@pytest.mark.parametrize("name", ["linear", "expert_linear", "expert_low_rank", "embedding", "dequantize"])
def test_compiles_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()
    function, arguments = compilable(name)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), function(*arguments))


@pytest.mark.parametrize("name", ["linear", "expert_linear", "expert_low_rank"])
def test_compiles_with_gradients(name: str) -> None:
    torch._dynamo.reset()
    function, (x,) = compilable(name)
    compiled, grads = torch.compile(function, fullgraph=True, backend="aot_eager"), []
    for call in (compiled, function):
        leaf = x.clone().requires_grad_()
        call(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
