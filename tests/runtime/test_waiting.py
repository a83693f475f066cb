"""compress_activation: bounded, copied where it cannot be packed, refused where a gradient would end."""

from __future__ import annotations

import pytest
import torch

from ciuic_hf import CiuicError, compress_activation


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (2, 7, 130), (1, 64, 256)])
def test_it_comes_back_within_half_a_step(bits: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    activation = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = activation.clone()
    waiting = compress_activation(activation, bits)
    restored = waiting.decompress()
    assert restored.shape == waiting.shape == activation.shape
    assert restored.dtype == waiting.dtype == dtype
    assert torch.equal(activation, before)
    span = float(activation.max() - activation.min()) if activation.numel() else 0.0
    # low and step are rounded outwards to bfloat16, the result once more to its own type
    bound = 0.5 * (span + 0.04) / (2**bits - 1) * 1.01 + 5 * torch.finfo(dtype).eps
    assert ((restored.float() - activation.float()).abs() <= bound).all()


def test_bytes_of_a_hidden_state() -> None:
    hidden = torch.randn(2, 512, 256, dtype=torch.bfloat16)
    for bits, fewer in ((8, 1.93), (4, 3.76), (2, 6.4)):
        assert hidden.nbytes / compress_activation(hidden, bits).nbytes >= fewer


def test_transposed_and_repeatable() -> None:
    hidden = torch.randn(64, 40).t()
    one, other = (compress_activation(hidden, 8).decompress() for _ in range(2))
    assert torch.equal(one, other)
    torch.testing.assert_close(one, hidden, rtol=0, atol=0.02)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_what_cannot_be_packed_is_copied(bad: float) -> None:
    hidden = torch.randn(300)
    hidden[7] = bad
    waiting = compress_activation(hidden, 4)
    assert torch.equal(waiting.decompress(), hidden) or hidden.isnan().any()
    assert waiting.decompress()[7].isnan() == hidden[7].isnan()
    assert waiting.nbytes == hidden.nbytes and waiting.decompress().data_ptr() != hidden.data_ptr()


def test_bad_input_is_refused() -> None:
    hidden = torch.randn(4)
    for call, message in (
        (lambda: compress_activation(hidden, 3), "8, 4 or 2 bits"),
        (lambda: compress_activation(torch.ones(3, dtype=torch.int64)), "int64"),
        (lambda: compress_activation([1.0]), "list"),  # type: ignore[arg-type]
        (lambda: compress_activation(hidden.clone().requires_grad_()), "requires a gradient"),
    ):
        with pytest.raises(CiuicError, match=message):
            call()
