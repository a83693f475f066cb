"""How far sums of compressed gradients drift: 64 micro-batches of a small Llama against the exact sum.

python -m ciuic_hf.bench.gradients
"""

from __future__ import annotations

import torch
from torch import Tensor

from ciuic_hf.bench.machine import machine_name
from ciuic_hf.bench.training import BATCH, LENGTH, build_model, token_stream, windows
from ciuic_hf.runtime.gradients import CompressedGradient, StochasticCompressor

MICRO_BATCHES = 64
SETTINGS = ((8, 0), (4, 0), (8, 2), (8, 4), (4, 4), (4, 8))


def measure(settings: tuple[tuple[int, int], ...] = SETTINGS) -> dict[tuple[int, int], tuple[float, float]]:
    """(bits, feedback bits) -> fewer bytes than float32, ||sum - exact|| / ||exact|| over all matrices."""
    model, generator = build_model(), torch.Generator().manual_seed(0)
    batches = windows(token_stream(), generator)
    weights = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    exact = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
    sums: dict[tuple[int, int], list[CompressedGradient]] = {setting: [] for setting in settings}
    for micro_batch in range(MICRO_BATCHES):
        ids = next(batches)
        model.zero_grad()
        (model(ids, labels=ids).loss / MICRO_BATCHES).backward()
        for index, weight in enumerate(weights):
            gradient = weight.grad
            assert gradient is not None
            exact[index] += gradient
            for setting, totals in sums.items():
                if micro_batch == 0:
                    totals.append(_first(gradient, *setting))
                else:
                    totals[index].add_(gradient)
    norm = sum(float(total.square().sum()) for total in exact) ** 0.5
    dense = sum(weight.nbytes for weight in weights)
    return {
        setting: (
            dense / sum(total.nbytes for total in totals),
            _distance(totals, exact) / norm,
        )
        for setting, totals in sums.items()
    }


def _first(gradient: Tensor, bits: int, feedback_bits: int) -> CompressedGradient:
    compressor = StochasticCompressor(bits, stochastic=not feedback_bits)
    return CompressedGradient(compressor, gradient, feedback_bits=feedback_bits)


def _distance(totals: list[CompressedGradient], exact: list[Tensor]) -> float:
    pairs = zip(totals, exact, strict=True)
    return sum(float((total.decompress() - right).square().sum()) for total, right in pairs) ** 0.5


def main() -> None:
    """Prints a table."""
    torch.set_num_threads(1)
    print(f"{MICRO_BATCHES} micro-batches of {BATCH * LENGTH} tokens, {machine_name()}")
    print("bits  feedback bits  fewer bytes than float32  error of the sum")
    for (bits, feedback_bits), (fewer, error) in measure().items():
        print(f"{bits:4}  {feedback_bits:13}  {fewer:23.2f}x  {error:16.2%}")


if __name__ == "__main__":
    main()
