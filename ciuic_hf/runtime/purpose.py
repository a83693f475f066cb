"""For which function autograd saves a tensor: the tensor itself does not tell."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Purpose(Enum):
    """What the backward pass does with a saved tensor."""

    PRODUCT = "multiplies it with a gradient"
    QUADRATIC = "multiplies it by itself, or divides by it, or exponentiates it"
    LOGARITHM = "exponentiates it, and it is the logarithm of a probability"


_SOFTMAX = frozenset({nn.functional.softmax, torch.softmax, Tensor.softmax})
_LOG_SOFTMAX = frozenset({nn.functional.log_softmax, torch.log_softmax, Tensor.log_softmax})
_ATTENTION = nn.functional.scaled_dot_product_attention
_WATCHED = _SOFTMAX | _LOG_SOFTMAX | {nn.functional.cross_entropy, _ATTENTION}


class PurposeMode(TorchFunctionMode):
    """Knows which of the watched functions is executing. Costs about a microsecond a call in Python."""

    def __init__(self) -> None:
        super().__init__()
        self._executing: Callable[..., Any] | None = None
        self._learns_target = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _WATCHED or self._executing is not None:
            return func(*args, **kwargs)
        self._executing = func
        # a target with a gradient of its own is given the logarithms themselves
        target = kwargs.get("target", args[1] if len(args) > 1 else None)
        self._learns_target = isinstance(target, Tensor) and target.requires_grad
        try:
            return func(*args, **kwargs)
        finally:
            self._executing = None

    def of(self, tensor: Tensor) -> Purpose:
        """What a tensor that is being saved now is saved for."""
        if self._executing in _SOFTMAX or (tensor.dim() > 1 and tensor.shape[-1] == 1):
            return Purpose.QUADRATIC  # a last dimension of 1: a reciprocal root, a sum to divide by
        if self._executing is _ATTENTION:
            # rows of scores reduced to one number, by whose exponential they are divided
            return Purpose.QUADRATIC if tensor.dim() == 3 else Purpose.PRODUCT
        if self._executing in _LOG_SOFTMAX or self._executing is nn.functional.cross_entropy:
            node = tensor.grad_fn
            is_output = node is not None and node.name() == "LogSoftmaxBackward0"
            return Purpose.LOGARITHM if is_output and not self._learns_target else Purpose.QUADRATIC
        return Purpose.PRODUCT
