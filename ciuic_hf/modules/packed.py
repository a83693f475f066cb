"""What all compressed modules share: parameters that hold arenas and tags, and the offsets derived from them.

A compressed parameter keeps its name and holds the arena, 1-D uint8; ``<name>_tags`` holds the tags. Both are
``nn.Parameter`` without gradient, because accelerate offloads parameters and tensors of that name are what a
checkpoint stores. What operators need besides is derived at load, on each device, and never saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ciuic_hf.errors import CiuicError
from ciuic_kernels import BlockGrid, PackedTensor, ops
from ciuic_kernels.derived import Derived, derive
from ciuic_kernels.layout import FormatError

TAGS = "_tags"


def adopt(
    module: nn.Module, compressed: type[nn.Module], names: Iterable[str], dtype: torch.dtype | None
) -> None:
    """Turn a module into a compressed class in place, without weights; ``set_packed`` installs them.

    Args:
        names: its parameters that become compressed.
        dtype: dtype of dense results, that of the weights unless given.
    """
    weights = {name: module.get_parameter(name) for name in names}
    for name in weights:
        del module._parameters[name]
    module.__class__ = compressed
    assert isinstance(module, PackedModule)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    module._declare_packed(shapes, dtype or next(iter(weights.values())).dtype)


class PackedModule(nn.Module):
    """Mixin for a module with compressed parameters.

    Attributes:
        packed_shapes: parameter name -> logical shape ``(N, K)`` or ``(E, N, K)``.
        dense_dtype: dtype of the weights when decoded, and of an embedding's output.
    """

    packed_shapes: dict[str, tuple[int, ...]]
    dense_dtype: torch.dtype
    _derived: dict[tuple[str, torch.device], Derived]

    def _declare_packed(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.packed_shapes, self.dense_dtype, self._derived = shapes, dtype, {}

    def set_packed(self, name: str, packed: PackedTensor) -> None:
        """Install a compressed parameter. Raises CiuicError when its shape is another one."""
        if tuple(packed.shape) != tuple(self.packed_shapes[name]):
            raise CiuicError(
                f"{name} has shape {list(self.packed_shapes[name])}, the packed tensor {list(packed.shape)}."
            )
        self.register_parameter(name, nn.Parameter(packed.arena, requires_grad=False))
        self.register_parameter(name + TAGS, nn.Parameter(packed.tags, requires_grad=False))
        self._forget(name)

    def replace_bytes(self, name: str, packed: PackedTensor) -> None:
        """Put other blocks into a compressed parameter; the parameter objects stay, and with them what is tied.

        Raises CiuicError when shape or codecs are others.
        """
        old = self.packed(name)
        if tuple(packed.shape) != tuple(old.shape) or not torch.equal(
            packed.tags[..., 0].cpu(), old.tags[..., 0].cpu()
        ):
            raise CiuicError(f"{name} can only be replaced by blocks of the same shape and codecs.")
        getattr(self, name).data = packed.arena.to(old.arena.device)
        getattr(self, name + TAGS).data = packed.tags.to(old.tags.device)
        self._forget(name)  # a work table holds the exponents of the tags
        self.prepare()

    @property
    def is_compressed(self) -> bool:
        """Whether its parameters are compressed now; a CiuicLinear in training may hold full weights."""
        return all(name + TAGS in self._parameters for name in self.packed_shapes)

    def packed(self, name: str) -> PackedTensor:
        """A compressed parameter with its tags."""
        return PackedTensor(
            self.packed_shapes[name], getattr(self, name).data, getattr(self, name + TAGS).data
        )

    def _forget(self, name: str) -> None:
        self._derived = {key: value for key, value in self._derived.items() if key[0] != name}

    def derived(self, name: str) -> Derived:
        """What operators take after arena and tags; checked when first derived on a device. Raises CiuicError."""
        tags = getattr(self, name + TAGS)
        cached = self._derived.get((name, tags.device))
        if cached is None:
            grid = BlockGrid(tuple(self.packed_shapes[name]))
            try:
                cached = derive(tags.data, grid, getattr(self, name).numel())
            except FormatError as error:
                raise CiuicError(f"{type(self).__name__}.{name}: {error}") from None
            self._derived[name, tags.device] = cached
        return cached

    def prepare(self) -> None:
        """Check all parameters now and derive what operators need (weights must be on a real device)."""
        for name in self.packed_shapes:
            if getattr(self, name).device.type != "meta":
                self.derived(name)

    def dequantize(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The dense parameter, ``[N, K]`` or ``[E, N, K]``."""
        rows, cols = self.packed_shapes[name][-2:]
        arena, tags = getattr(self, name), getattr(self, name + TAGS)
        return ops.dequantize(arena, tags, *self.derived(name), rows, cols, dtype or self.dense_dtype)

    def dense_class(self) -> type[nn.Module]:
        """The class this module had before it was compressed."""
        raise NotImplementedError

    def restore(self, dtype: torch.dtype) -> nn.Module:
        """Turn it back into its original class with decoded weights, in place."""
        for name in self.packed_shapes:
            dense = nn.Parameter(self.dequantize(name, dtype), requires_grad=False)
            del self._parameters[name + TAGS]
            self._parameters[name] = dense
        dense_class = self.dense_class()
        for name in ("packed_shapes", "dense_dtype", "_derived"):
            del self.__dict__[name]
        self.__class__ = dense_class  # type: ignore[assignment]
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Arenas are bytes, so .to(dtype) leaves them alone; the dtype of dense results follows like a weight's.
        super()._apply(fn, recurse)
        self.dense_dtype = fn(torch.empty(0, dtype=self.dense_dtype)).dtype
        self._derived = {}
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._derived = {}

    def packed_repr(self) -> str:
        """``weight: 4.25 bits`` for each compressed parameter."""
        parts = []
        for name, shape in self.packed_shapes.items():
            if name + TAGS in self._parameters:
                nbytes = getattr(self, name).numel() + getattr(self, name + TAGS).numel()
                parts.append(f"{name}: {8 * nbytes / BlockGrid(tuple(shape)).numel:.2f} bits")
        return ", ".join(parts)
