"""What the kernel tests are made of: weights of many kinds, memory layouts, codec choices, implementations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ciuic_kernels import BlockGrid, PackedTensor, all_codecs
from ciuic_kernels.codecs.sparse import SPARSE, SparseCodec
from ciuic_kernels.packing import encode_tensor

IMPLEMENTATIONS = ("compiled", "reference")
KINDS = ("gaussian", "heavy", "sparse", "constant", "zeros", "rows", "integers")
LAYOUTS = ("contiguous", "transposed", "sliced", "strided")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SPARSE_SAMPLE = [SPARSE[p] for p in [(2, 4), (3, 7), (3, 20), (4, 1), (4, 8), (5, 20), (6, 13), (8, 2)]]
"""Every width, and capacities from the smallest to the largest."""

SAMPLED = [c for c in all_codecs() if not isinstance(c, SparseCodec)] + SPARSE_SAMPLE
"""All codecs, and of the 120 sparse ones a few."""

each_codec = pytest.mark.parametrize("codec", SAMPLED, ids=lambda codec: codec.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Run the body with one implementation: "compiled" or "reference"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CIUIC_IMPL", raising=False)
        if name == "reference":
            patch.setenv("CIUIC_IMPL", "reference")
        yield


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(
    shape: tuple[int, ...], seed: int, kind: str = "gaussian", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Finite weights, about 0.02 in size unless the kind says otherwise, exact in ``dtype``."""
    g = generator(seed)
    normal = 0.02 * torch.randn(shape, generator=g)
    if kind == "heavy":  # a few weights carry the group, the row or the block
        normal = normal / torch.rand(shape, generator=g).clamp_min(1e-3)
    elif kind == "sparse":
        normal = normal * (torch.rand(shape, generator=g) < 0.1)
    elif kind == "constant":
        normal = normal.flatten()[0].expand(shape).clone()
    elif kind == "zeros":
        normal = torch.zeros(shape)
    elif kind == "rows":  # more octaves within a block than its scales span
        normal = normal * 2.0 ** torch.randint(-12, 13, (*shape[:-1], 1), generator=g)
    elif kind == "integers":  # many ties between candidates
        normal = torch.randint(-3, 4, shape, generator=g).float()
    return normal.to(dtype)


def arranged(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), float("nan"), dtype=tensor.dtype)
        view = wide[..., 3:-2]
        return view.copy_(tensor)
    if layout == "strided":
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype)
        return wide[..., ::2].copy_(tensor)
    return tensor


def mixed_ids(shape: tuple[int, ...], seed: int, without: tuple[str, ...] = ()) -> Tensor:
    """A random codec for every block of a parameter."""
    choice = torch.tensor([c.id for c in SAMPLED if c.name not in without], dtype=torch.uint8)
    places = BlockGrid(shape).tags_shape[:-1]
    return choice[torch.randint(len(choice), places, generator=generator(seed))]


def refusing(dtype: torch.dtype) -> tuple[str, ...]:
    """Names of the codecs that do not take weights of this dtype, for ``mixed_ids(without=...)``."""
    return () if dtype == torch.float16 else ("raw_fp16",)


def packed_sample(shape: tuple[int, ...], seed: int = 0, codecs: tuple[str, ...] = ()) -> PackedTensor:
    """A parameter whose blocks are in these codecs (or all), at random; weights are float16, which all codecs take."""
    source = weights(shape, seed, dtype=torch.float16)
    others = tuple(codec.name for codec in all_codecs() if codecs and codec.name not in codecs)
    return encode_tensor(source, mixed_ids(shape, seed, without=others))


@st.composite
def blocks(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> Tensor:
    """A batch of blocks of one size, float32 ``[B, rows, cols]``."""
    rows, cols = draw(st.integers(1, 12)), draw(st.integers(1, 128))
    seed, kind = draw(st.integers(0, 2**16)), draw(st.sampled_from(kinds))
    return weights((draw(st.integers(1, 2)), rows, cols), seed, kind)


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of parameters: ragged, of real models' widths, and fused experts."""
    rows = st.integers(1, 200)
    return st.one_of(
        st.tuples(rows, st.integers(1, 400)),
        st.tuples(rows, st.sampled_from([64, 128, 192, 256, 576, 704])),
        st.tuples(st.integers(1, 3), st.integers(1, 100), st.integers(1, 200)),
    )
