"""Where converted parameters go: into the model, or somewhere else that a caller sets up for one load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ciuic_hf.hf.encoder import Encoder, Recipe


class Stack:
    """The experts of a parameter that is kept, ``[E, N, K]`` in the dtype of its placeholder, one by one."""

    def __init__(self, placeholder: Tensor) -> None:
        self._placeholder = placeholder
        self._stacked: Tensor | None = None

    def add(self, index: int, expert: Tensor) -> None:
        """Take expert ``index`` ``[N, K]``."""
        if self._stacked is None:
            shape, dtype = self._placeholder.shape, self._placeholder.dtype
            self._stacked = torch.empty(shape, dtype=dtype, device=expert.device)
        self._stacked[index] = expert

    def finish(self) -> Tensor:
        """All experts."""
        assert self._stacked is not None
        return self._stacked


class Destination:
    """The model itself: every parameter is made whole in memory and installed by transformers."""

    def encoder(self, recipe: Recipe) -> Encoder:
        """What encodes a parameter."""
        return Encoder(recipe)

    def stack(self, name: str, placeholder: Tensor) -> Stack:
        """What takes the experts of a parameter that is kept."""
        return Stack(placeholder)

    def finished(self, name: str) -> dict[str, Tensor] | None:
        """What stands for a parameter that needs no conversion any more, under its names; None if it does."""
        return None

    def holds_tied(self, model: Any, name: str, weight: Tensor, scale: Tensor | None) -> bool:
        """Whether a parameter that is tied to this one has come with the same values: then this one is left out.

        In memory transformers compares and ties the finished parameters itself.
        """
        return False

    def arrived(self, name: str, tensor: Tensor) -> Tensor:
        """What the model gets for a finished tensor."""
        return tensor


_CURRENT: ContextVar[Destination | None] = ContextVar("ciuic_destination", default=None)


def current_destination() -> Destination:
    """The destination of a load that begins now."""
    return _CURRENT.get() or Destination()


@contextmanager
def loading_to(destination: Destination) -> Iterator[None]:
    """Let loads that begin in this context bring all parameters to ``destination``."""
    from transformers import core_model_loading

    install = core_model_loading.set_param_for_module

    def install_arrived(model: Any, name: str, tensor: Tensor, info: Any, hf_quantizer: Any) -> None:
        if getattr(hf_quantizer, "destination", None) is destination:
            tensor = destination.arrived(name, tensor)
        install(model, name, tensor, info, hf_quantizer)

    token = _CURRENT.set(destination)
    core_model_loading.set_param_for_module = install_arrived
    try:
        yield
    finally:
        core_model_loading.set_param_for_module = install
        _CURRENT.reset(token)
