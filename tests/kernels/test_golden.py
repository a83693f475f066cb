"""The format does not drift: the golden file's bytes come out of today's encoder, and decode to what they did.

When this fails, see ``make_golden.py`` for what may be regenerated and what needs a new FORMAT_VERSION.
"""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from ciuic_kernels import FORMAT_VERSION, PackedTensor
from ciuic_kernels.codec import Codec
from ciuic_kernels.packing import decode_tensor
from tests.kernels.make_golden import PATH, SHAPE, digest, encode_golden, golden_source
from tests.kernels.samples import each_codec

pytestmark = pytest.mark.usefixtures("impl")
HINT = "the format changed: see tests/kernels/make_golden.py, a change needs a new FORMAT_VERSION"


def stored(codec: Codec) -> dict[str, torch.Tensor]:
    with safe_open(PATH, "pt") as file:
        assert file.metadata()["format_version"] == str(FORMAT_VERSION)
        return {
            f"{codec.name}.{part}": file.get_tensor(f"{codec.name}.{part}")
            for part in ("arena", "tags", "digest")
        }


@each_codec
def test_encoding_gives_the_same_bytes(codec: Codec) -> None:
    golden, now = stored(codec), encode_golden(codec)
    for name in golden:
        assert torch.equal(golden[name], now[name]), f"{name}: {HINT}"


@each_codec
def test_old_bytes_decode_to_the_same_weights(codec: Codec) -> None:
    arena, tags, expected = stored(codec).values()
    decoded = decode_tensor(PackedTensor(SHAPE, arena, tags))
    assert torch.equal(digest(decoded), expected), f"{codec.name}: {HINT}"
    if codec.name == "raw_fp16":
        assert torch.equal(decoded, golden_source().float())
