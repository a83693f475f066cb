"""Tensors that are not there until an operation needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Deferred(Tensor):
    """Has a shape, a dtype and a device, but no data; any operation on it works on what ``compute`` returns.

    Code that knows the subclass takes what it was made from instead, and the data never comes to be.
    """

    compute: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls: type[Deferred],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        compute: Callable[[], Tensor],
    ) -> Deferred:
        out: Deferred = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        out.compute = compute
        return out

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(Deferred, lambda x: x.compute(), (args, kwargs or {}))
        return func(*args, **kwargs)
