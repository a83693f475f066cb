"""What every registered codec promises, whatever it stores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from ciuic_kernels import all_codecs, codec_by_id, codec_by_name, codecs
from ciuic_kernels.codec import Codec, register_codec
from ciuic_kernels.codecs.sparse import SparseCodec
from tests.kernels.samples import KINDS, blocks, each_codec, weights


def test_ids_and_names_are_unique() -> None:
    known = all_codecs()
    assert len({c.id for c in known}) == len({c.name for c in known}) == len(known)
    assert all(0 <= c.id <= 255 for c in known)
    assert [codec_by_id(c.id) for c in known] == [codec_by_name(c.name) for c in known] == known


def test_a_second_codec_with_the_same_id_is_refused() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        register_codec(all_codecs()[0])


def test_an_unknown_codec_is_named() -> None:
    with pytest.raises(ValueError, match="255"):
        codec_by_id(255)
    with pytest.raises(ValueError, match="known tags are 0 to 2, 34 to 38, 40, 66 to 70, 72, 128 to 247"):
        codec_by_id(255)
    with pytest.raises(ValueError, match=r"grid4_g32, grid4_g64.*, sparse4_d1 to sparse4_d20.*zero"):
        codec_by_name("grid4")


def test_every_codec_file_is_imported() -> None:
    folder = Path(codecs.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files == {name for name in files if hasattr(codecs, name)}


@each_codec
def test_protocol(codec: Codec) -> None:
    assert isinstance(codec, Codec)


@each_codec
@settings(max_examples=15)
@given(batch=blocks())
def test_records(codec: Codec, batch: torch.Tensor) -> None:
    """Length, dtype, determinism, and each block on its own: a record says nothing about its neighbours."""
    count, rows, cols = batch.shape
    records, exponents = codec.encode(batch)
    assert records.shape == (count, codec.record_nbytes(rows, cols)) and records.dtype == torch.uint8
    assert exponents.shape == (count,) and exponents.dtype == torch.uint8
    decoded = codec.decode(records, exponents, rows, cols)
    assert decoded.shape == batch.shape and decoded.dtype == torch.float32
    assert decoded.isfinite().all()
    for i in range(count):
        record, exponent = codec.encode(batch[i : i + 1].clone())
        assert torch.equal(record, records[i : i + 1]) and torch.equal(exponent, exponents[i : i + 1])
        assert torch.equal(codec.decode(record, exponent, rows, cols), decoded[i : i + 1])


@each_codec
def test_bits_are_those_of_a_full_block(codec: Codec) -> None:
    assert codec.record_nbytes(64, 128) * 8 == codec.bits * 64 * 128


@each_codec
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zero(codec: Codec, kind: str) -> None:
    batch = weights((2, 64, 100), 1, kind)
    batch[torch.rand(batch.shape) < 0.3] = 0.0
    decoded = codec.decode(*codec.encode(batch), 64, 100)
    assert (decoded[batch == 0] == 0).all()


@each_codec
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 128), (64, 1), (3, 31), (7, 33), (64, 63), (5, 65)])
def test_odd_tails(codec: Codec, rows: int, cols: int) -> None:
    """The weights of a small block are stored as well as those of a block where zeros surround them."""
    batch = weights((1, rows, cols), 5)
    if isinstance(codec, SparseCodec):  # a smaller block keeps fewer weights
        batch.view(-1)[codec.slots(rows, cols) :] = 0
    padded = torch.zeros(1, 64, 128)
    padded[:, :rows, :cols] = batch
    small = codec.decode(*codec.encode(batch), rows, cols)
    assert torch.equal(small, codec.decode(*codec.encode(padded), 64, 128)[:, :rows, :cols])


@each_codec
def test_negative_zero_is_zero(codec: Codec) -> None:
    zeros, negative = torch.zeros(1, 64, 128), -torch.zeros(1, 64, 128)
    assert codec.decode(*codec.encode(negative), 64, 128).eq(0).all()
    if not codec.name.startswith("raw"):
        assert torch.equal(codec.encode(zeros)[0], codec.encode(negative)[0])
