"""Running the GPU kernels where there is no GPU: Triton's interpreter takes CPU tensors.

bfloat16 is left out: the interpreter multiplies its bits as integers. The PTX of the kernels has plain twins there;
``test_asm.py`` proves the PTX itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from ciuic_kernels import PackedTensor, derived, dispatch
from ciuic_kernels.device import DeviceFacts
from ciuic_kernels.packing import decode_tensor
from tests.kernels.operands import Operand
from tests.kernels.samples import generator, implementation, packed_sample

FACTS = DeviceFacts("cuda", "interpreter", 90, 4)

needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """Have every operator take its Triton kernels, on CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CIUIC_IMPL", raising=False)
        for module in (dispatch, derived):
            patch.setattr(module, "device_facts", lambda device: FACTS)
        dispatch._choice.cache_clear()
        try:
            yield
        finally:
            dispatch._choice.cache_clear()


def operand_of(packed: PackedTensor) -> Operand:
    """A parameter with the work table that the kernels follow."""
    with implementation("reference"):
        dense = decode_tensor(packed)
    with gpu_kernels():
        tables = derived.derive(packed.tags, packed.grid, packed.arena.numel())
    return Operand(packed.arena, packed.tags, tables, dense)


def sample(shape: tuple[int, ...], seed: int = 0, codecs: tuple[str, ...] = ()) -> Operand:
    """A parameter whose blocks are in these codecs at random, or in all."""
    with implementation("reference"):
        return operand_of(packed_sample(shape, seed, codecs))


def counters(w: Operand) -> Tensor:
    """The counters of a work table: zero between launches."""
    from ciuic_kernels.work import WorkShape

    return w.derived.work[WorkShape.of(w.derived.work, w.tags).counters_at :]


def random_ids(shape: tuple[int, ...], experts: int, seed: int) -> Tensor:
    """Expert ids, now and then outside of what exists."""
    return torch.randint(-1, experts + 2, shape, generator=generator(seed))
