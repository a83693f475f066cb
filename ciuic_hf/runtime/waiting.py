"""An activation of inference that waits: between stages of a pipeline, or for the rest of a long prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from ciuic_hf.errors import CiuicError
from ciuic_hf.runtime.packing import GROUPS, PACKABLE
from ciuic_hf.runtime.stochastic import BITS, PackedOrExact, pack, unpack


class CompressedActivation(PackedOrExact):
    """What ``compress_activation`` returns."""

    def decompress(self) -> Tensor:
        """A new tensor of the shape and dtype of the source, on its device, in row-major order."""
        if self.groups is None:
            assert self.exact is not None
            return self.exact.clone()
        return unpack(self.groups).view(self.shape)


def compress_activation(tensor: Tensor, bits: int = 8) -> CompressedActivation:
    """Packs an activation that no gradient flows through; for those of training there is ``compress_activations``.

        waiting = compress_activation(hidden_states, bits=8)
        del hidden_states
        ...
        hidden_states = waiting.decompress()

    Groups of 128 values (64 at 2 bits) with a step and a low, nothing clipped, rounded to the nearest: no value
    moves further than half a step of its group. A tensor with NaN, infinity or magnitudes beyond 2^120 is copied.

    Args:
        tensor: float32, float16 or bfloat16, any shape; it is not changed and not kept.
        bits: 8, 4 or 2; 8.25, 4.25 or 2.5 in all.

    Raises:
        CiuicError: for other bits or types, and for a tensor that requires a gradient.
    """
    if isinstance(bits, bool) or bits not in BITS:
        raise CiuicError(f"Activations are packed at 8, 4 or 2 bits, got bits={bits!r}.")
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.dtype not in PACKABLE:
        what = f"{tensor.dtype} {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise CiuicError(f"An activation is a dense tensor of float32, float16 or bfloat16, got {what}.")
    if tensor.requires_grad:
        raise CiuicError(
            "This activation requires a gradient, which would end here; compute it under torch.no_grad(), or use "
            "compress_activations for training."
        )
    groups = pack(tensor.reshape(-1), bits, GROUPS[bits], None)
    exact = tensor.contiguous().clone() if groups is None else None
    return CompressedActivation(tensor.shape, tensor.dtype, groups, exact)
