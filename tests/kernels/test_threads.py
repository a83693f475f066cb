"""The number of threads changes no bit: every strip, row and group is one thread's work."""

from __future__ import annotations

import pytest
import torch

from ciuic_kernels import ops
from ciuic_kernels.packing import encode_tensor
from tests.kernels.operands import activations, operand
from tests.kernels.samples import implementation, mixed_ids, weights


def results() -> list[torch.Tensor]:
    w, e = operand((150, 576)), operand((6, 64, 192))
    source = weights((900, 300), 0, dtype=torch.float16)
    packed = encode_tensor(source, mixed_ids((900, 300), 0))
    ids = torch.arange(24).remainder(7).reshape(12, 2)
    return [
        packed.arena,
        packed.tags,
        ops.dequantize(*w.stored, w.rows, w.cols, torch.bfloat16),
        ops.embedding(torch.arange(150), *w.stored, w.rows, w.cols, torch.float32),
        ops.linear(activations(5, w.cols), *w.stored, None, w.rows, w.cols),
        ops.expert_linear(activations(12, e.cols), ids, *e.stored, e.rows, e.cols),
    ]


@pytest.mark.usefixtures("compiled")
def test_results_do_not_depend_on_the_threads() -> None:
    with implementation("compiled"):
        alone = results()
        torch.set_num_threads(4)
        for _ in range(10):
            assert all(torch.equal(a, b) for a, b in zip(alone, results(), strict=True))
