"""A model forwards and backwards one decoder layer at a time, so that only one has to be in memory.

Going forwards a layer keeps its input and nothing else. Going backwards it runs again, as in gradient checkpointing,
and its own graph is followed at once. Its weights are needed in these two moments only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ciuic_hf.errors import CiuicError


class Visitor(Protocol):
    """What happens around the layers."""

    def present(self, name: str, layer: nn.Module) -> AbstractContextManager[Any]:
        """Around every use of a layer: inside, its weights are there."""
        ...

    def finished(self, name: str, layer: nn.Module) -> None:
        """Called once for each layer, its weights still there, when all gradients inside have arrived."""
        ...


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """By name the modules that transformers keeps on one device: the layers of a model, outermost only."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if type(module).__name__ in kinds and not inside:
            found[name] = module
    return found


@contextmanager
def layer_by_layer(model: nn.Module, visitor: Visitor) -> Iterator[None]:
    """Inside, the layers of ``model`` run as the module says; afterwards everything is as it was."""
    with ExitStack() as undo:
        for name, layer in decoder_layers(model).items():
            before = layer.__dict__.get("forward")
            layer.__dict__["forward"] = _Layer(name, layer, layer.forward, visitor)
            undo.callback(_restore, layer, before)
        yield


def _restore(layer: nn.Module, before: Callable[..., Any] | None) -> None:
    layer.__dict__.pop("forward")
    if before is not None:
        layer.__dict__["forward"] = before


@dataclass(frozen=True)
class _Layer:
    """The forward of one layer."""

    name: str
    layer: nn.Module
    forward: Callable[..., Any]
    visitor: Visitor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        rest: list[Any] = []

        def run(x: Tensor) -> Tensor:
            out = self.forward(x, *args[1:], **kwargs)
            first, *others = out if isinstance(out, tuple) else (out,)
            if not isinstance(first, Tensor):
                raise CiuicError(
                    f"{self.name} gives a {type(first).__name__}; a layer has to give hidden states."
                )
            rest[:] = others if isinstance(out, tuple) else [None]
            return first

        out = _Through.apply(hidden, run, self)
        return (out, *rest) if rest != [None] else out


class _Through(torch.autograd.Function):
    """Hidden states through a layer, without keeping what happens inside."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, run: Callable[[Tensor], Tensor], layer: _Layer) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.run, ctx.layer = run, layer
        with layer.visitor.present(layer.name, layer.layer), torch.no_grad():
            return run(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        hidden, layer = ctx.saved_tensors[0].detach().requires_grad_(), ctx.layer
        with layer.visitor.present(layer.name, layer.layer):
            with torch.enable_grad():
                out = ctx.run(hidden)
            torch.autograd.backward(out, gradients[0])
            layer.visitor.finished(layer.name, layer.layer)
        return hidden.grad, None, None


def in_memory(_name: str, _layer: nn.Module) -> AbstractContextManager[Any]:
    """For :class:`Visitor`: the weights are there all the time."""
    return nullcontext()
