"""Activations that autograd saves for the backward pass, packed while they wait."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from ciuic_hf.errors import CiuicError
from ciuic_hf.runtime.packing import MIN_NUMEL, PACKABLE, Packed, bits_for, pack_activation, unpack_activation
from ciuic_hf.runtime.purpose import Purpose, PurposeMode
from ciuic_hf.runtime.saved import Geometry, executing_layer, is_held_elsewhere
from ciuic_hf.runtime.stochastic import BITS


def compress_activations(
    model: nn.Module | None = None, *, bits: int = 4, min_numel: int = MIN_NUMEL, seed: int = 0
) -> ActivationCompression:
    """Packs what autograd saves: as a context around forward and backward, or in every forward of ``model``.

        with compress_activations(bits=4):
            loss = model(**batch).loss
            loss.backward()

    Rounding is stochastic and unbiased, from a generator of its own: runs repeat, and dropout draws what it would
    have drawn. Exactly kept are weights (their views and casts too), buffers, integers, bools, float64, tensor
    subclasses, tensors below ``min_numel`` elements and those with NaN, infinity or magnitudes beyond 2^120; bools
    as bits, and integers in the smallest type that holds them. What softmax saves takes 8 bits at least, and so do
    statistics; log_softmax's and cross_entropy's logarithms are packed as probabilities, at 4 bits at least.

    Args:
        model: packs inside its forward, until ``remove()``; a loss computed outside of it is not covered.
        bits: 8, 4 or 2; 8.25, 4.25 or 2.5 in all.
        min_numel: smaller tensors are not worth the time.
        seed: of the rounding.

    Raises:
        CiuicError: for other bits, another kind of model, or a model that torch.compile made.
    """
    if isinstance(bits, bool) or bits not in BITS:
        raise CiuicError(f"Activations are packed at 8, 4 or 2 bits, got bits={bits!r}.")
    if isinstance(min_numel, bool) or not isinstance(min_numel, int) or min_numel < 1:
        raise CiuicError(f"min_numel is a number of elements, 1 or more, got {min_numel!r}.")
    if model is not None and not isinstance(model, nn.Module):
        raise CiuicError(
            f"Expected a torch module, got {type(model).__name__}; bits are given by name, bits=4."
        )
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise CiuicError(
            "A compiled model would compile the hooks with it; use `with compress_activations(bits=...):` around "
            "its forward and backward."
        )
    return ActivationCompression(model, bits, min_numel, seed)


class ActivationCompression:
    """What ``compress_activations`` returns: a context, and a count of what was saved since it began.

    Attributes:
        original_nbytes: of the activations that autograd saved, what is shared counted once; weights do not count.
        stored_nbytes: what was held in their place.
        nonfinite: layer -> number of tensors that were kept because of NaN, infinity or more than 2^120.
    """

    def __init__(self, model: nn.Module | None, bits: int, min_numel: int, seed: int) -> None:
        self.bits, self.min_numel, self.seed = bits, min_numel, seed
        self.original_nbytes, self.stored_nbytes = 0, 0
        self.nonfinite: Counter[str] = Counter()
        self._generator = torch.Generator().manual_seed(seed)
        self._register: dict[tuple[Any, ...], tuple[StorageWeakRef, weakref.ref[_Shared] | None]] = {}
        self._register_limit = 512
        self._mode = PurposeMode()
        self._entered: list[saved_tensors_hooks] = []
        self._model_hooks: list[Any] = []
        if model is not None:
            self._model_hooks = [
                model.register_forward_pre_hook(lambda *_: self._enter(), prepend=True),
                model.register_forward_hook(lambda *_: self._leave(), always_call=True),
            ]
        self._of_model = model is not None

    @property
    def ratio(self) -> float:
        """original_nbytes / stored_nbytes, 1 where nothing was saved."""
        return self.original_nbytes / self.stored_nbytes if self.stored_nbytes else 1.0

    def __repr__(self) -> str:
        return (
            f"ActivationCompression(bits={self.bits}, original_nbytes={self.original_nbytes}, "
            f"stored_nbytes={self.stored_nbytes}, ratio={self.ratio:.2f})"
        )

    def reset(self) -> None:
        """Counts from here on."""
        self.original_nbytes, self.stored_nbytes = 0, 0
        self.nonfinite.clear()

    def remove(self) -> None:
        """Takes the hooks off the model; what is packed already stays usable."""
        for hook in self._model_hooks:
            hook.remove()
        self._model_hooks.clear()

    def __enter__(self) -> Self:
        if not self._of_model:
            self._enter()
        return self

    def __exit__(self, *_: object) -> None:
        if self._of_model:
            self.remove()
        else:
            self._leave()

    def _enter(self) -> None:
        if torch.compiler.is_compiling():
            raise CiuicError(
                "compress_activations cannot be entered inside of a compiled function; enter it around the call."
            )
        hooks = saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        self._mode.__enter__()
        self._entered.append(hooks)

    def _leave(self) -> None:
        if self._entered:  # a pre-hook of the user's that failed came before ours
            self._mode.__exit__(None, None, None)
            self._entered.pop().__exit__(None, None, None)

    def _pack(self, tensor: Tensor) -> object:
        if isinstance(tensor, nn.Parameter):
            return tensor
        if not _is_plain(tensor):
            self.original_nbytes += tensor.nbytes
            self.stored_nbytes += tensor.nbytes
            return _Kept(tensor.detach(), tensor._version)
        if is_held_elsewhere(tensor):
            return _Kept(tensor.detach(), tensor._version)
        purpose = self._mode.of(tensor)
        geometry, values = Geometry.of(tensor)
        key = (tensor.untyped_storage()._cdata, tensor._version, tensor.dtype, purpose, geometry.key)
        known = self._register.get(key)
        if known is not None and not known[0].expired():
            found = known[1]() if known[1] is not None else None
            if found is not None:
                return _PackedView(found, geometry)
            if known[1] is None:
                return _Kept(tensor.detach(), tensor._version)
        packed = self._packed(values, purpose)
        self.original_nbytes += values.nbytes
        self.stored_nbytes += values.nbytes if packed is None else packed.nbytes
        shared = None if packed is None else _Shared(packed)
        self._remember(key, tensor, shared)
        return _Kept(tensor.detach(), tensor._version) if shared is None else _PackedView(shared, geometry)

    def _packed(self, values: Tensor, purpose: Purpose) -> Packed | None:
        """None for what is kept as it is."""
        if values.numel() < self.min_numel:
            return None
        seed = int(torch.empty((), dtype=torch.int64).random_(generator=self._generator))
        packed = pack_activation(values, purpose, bits_for(purpose, self.bits), seed)
        if packed is None and values.dtype in PACKABLE:
            layer = executing_layer()
            if layer not in self.nonfinite:
                warnings.warn(
                    f"{layer}: activations with NaN, infinity or magnitudes beyond 2^120 are kept as they are, not "
                    "packed; the step goes on.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self.nonfinite[layer] += 1
        return packed

    def _remember(self, key: tuple[Any, ...], tensor: Tensor, shared: _Shared | None) -> None:
        """By weak references only. While one to a storage exists, no other gets its address."""
        if len(self._register) >= self._register_limit:
            for old, (storage, stored) in list(self._register.items()):
                if storage.expired() or (stored is not None and stored() is None):
                    del self._register[old]
            self._register_limit = max(512, 2 * len(self._register))
        storage = StorageWeakRef(tensor.untyped_storage())
        self._register[key] = (storage, None if shared is None else weakref.ref(shared))

    @staticmethod
    def _unpack(saved: Any) -> Tensor:
        if isinstance(saved, _PackedView):
            return saved.geometry.restore(unpack_activation(saved.shared.packed))
        if isinstance(saved, _Kept):
            if saved.tensor._version != saved.version:
                raise RuntimeError(
                    f"A tensor {list(saved.tensor.shape)} that the backward pass needs was modified in place after "
                    "the forward pass; use an operation that is not in place."
                )
            return saved.tensor
        return saved


def _is_plain(tensor: Tensor) -> bool:
    strided = tensor.layout == torch.strided and not tensor.is_quantized
    return type(tensor) is Tensor and strided and tensor.device.type != "meta"


class _Shared:
    """Owned by the handles in the graph."""

    __slots__ = ("__weakref__", "packed")

    def __init__(self, packed: Packed) -> None:
        self.packed = packed


@dataclass(frozen=True)
class _PackedView:
    shared: _Shared
    geometry: Geometry


@dataclass(frozen=True)
class _Kept:
    """A detached tensor (an output would keep itself alive), with what autograd's own check needs."""

    tensor: Tensor
    version: int
