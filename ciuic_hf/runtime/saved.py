"""What a tensor is that autograd saves: how it lies in memory, whether it is a weight, which layer it comes from."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# Nodes after which a weight is still the weight: views, copies and casts.
_STILL_A_WEIGHT = frozenset(
    f"{name}Backward{index}"
    for name in [
        *("Alias", "AsStrided", "Clone", "Detach", "Expand", "Permute", "ReshapeAlias", "Select", "Slice"),
        *(
            "Split",
            "SplitWithSizes",
            "Squeeze",
            "T",
            "ToCopy",
            "Transpose",
            "Unbind",
            "UnsafeView",
            "Unsqueeze",
        ),
        "View",
    ]
    for index in (0, 1)
)


@dataclass(frozen=True)
class Geometry:
    """How a tensor lies over its values.

    Attributes:
        key: tells apart the values that tensors on one storage have.
        size: of the tensor.
        stride: of the tensor over its values in the order of memory; None where there are gaps between them, and
            they are stored in row-major order.
    """

    key: tuple[Any, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...] | None

    @classmethod
    def of(cls, tensor: Tensor) -> tuple[Geometry, Tensor]:
        """The geometry of a tensor and its values ``[n]``, each once; a view wherever there are no gaps."""
        tensor = tensor.detach()
        size, stride, offset = tuple(tensor.size()), tuple(tensor.stride()), tensor.storage_offset()
        # What expand() repeats has stride 0.
        repeated = [step == 0 and count > 1 for count, step in zip(size, stride, strict=True)]
        once = tuple(1 if skip else count for skip, count in zip(repeated, size, strict=True))
        if _is_dense(once, stride):
            count = math.prod(once)
            return cls((offset, count), size, stride), tensor.as_strided((count,), (1,), offset)
        return cls((offset, size, stride), size, None), tensor.reshape(-1)

    def restore(self, values: Tensor) -> Tensor:
        """The tensor from its values ``[n]``, as a view."""
        return values.view(self.size) if self.stride is None else values.as_strided(self.size, self.stride)


def _is_dense(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for step, count in sorted(zip(stride, size, strict=True)):
        if count != 1 and step != expected:
            return False
        expected *= count
    return True


def is_held_elsewhere(tensor: Tensor) -> bool:
    """Whether a module owns this anyway: a weight, or a buffer of the layer that is executing."""
    return is_weight(tensor) or (not tensor.requires_grad and _is_own_buffer(tensor))


def _is_own_buffer(tensor: Tensor) -> bool:
    innermost = next(_executing_modules(), None)
    if innermost is None:
        return False
    storage = tensor.untyped_storage()._cdata
    return any(buffer.untyped_storage()._cdata == storage for buffer in innermost.buffers(recurse=False))


def is_weight(tensor: Tensor) -> bool:
    """Whether this is a parameter, or one after nothing but views, copies and casts."""
    if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
        return True
    node = tensor.grad_fn
    while node is not None and node.name() in _STILL_A_WEIGHT and node.next_functions:
        node = node.next_functions[0][0]
    if node is not None and isinstance(getattr(node, "variable", None), nn.Parameter):
        return True
    return tensor.dim() == 2 and not tensor.requires_grad and _looks_like_a_cast_weight(tensor)


def _looks_like_a_cast_weight(tensor: Tensor) -> bool:
    """A cast of a frozen weight leaves no trace in the graph; its layer, which is executing, has its shape."""
    innermost = next(_executing_modules(), None)
    if innermost is None:
        return False
    shapes = (tuple(tensor.shape), tuple(tensor.shape[::-1]))
    own = innermost.parameters(recurse=False)
    return any(tuple(p.shape) in shapes and p.dtype != tensor.dtype for p in own)


def executing_layer() -> str:
    """The name, from the outermost module that is executing, of the innermost one."""
    modules = list(_executing_modules())
    if not modules:
        return "outside of any module"
    names = {id(module): name for name, module in modules[-1].named_modules()}
    named = (names[id(module)] for module in modules if names.get(id(module)))
    return next(named, type(modules[-1]).__name__)


def _executing_modules() -> Iterator[nn.Module]:
    """The modules on the Python stack, innermost first: no hook on every layer for what is hardly ever asked."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_call_impl" and isinstance(frame.f_locals.get("self"), nn.Module):
            yield frame.f_locals["self"]
        if frame.f_back is None:
            return
        frame = frame.f_back
