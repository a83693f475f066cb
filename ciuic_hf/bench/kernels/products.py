"""Products with the weights of real models, against cuBLAS and other libraries: one row a weight, bits and tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from ciuic_hf.bench.kernels.operands import Operand, activations, random_operand, random_weight, routing
from ciuic_hf.bench.kernels.peers import PEERS, Peer, Product, cublas, prepared
from ciuic_hf.bench.kernels.shapes import WeightShape
from ciuic_hf.bench.kernels.timing import Call, Timer, said_by
from ciuic_hf.bench.kernels.workers import processors
from ciuic_kernels import ops
from ciuic_kernels.dispatch import use_triton

CUBLAS = "cuBLAS bf16"


@dataclass(frozen=True)
class Format:
    """What weights are stored in.

    Attributes:
        bits: of a weight, as shown and as the bar speaks of them.
        setting: codec, or bits per weight.
    """

    bits: float
    setting: float | str


FORMATS = (
    Format(4, "grid4_g64"),
    Format(4.25, 4.25),
    Format(2, "grid2_g64"),
    Format(3, "grid3_g64"),
    Format(8, "grid8_g64"),
)


@dataclass
class ProductRow:
    """One comparison.

    Attributes:
        name: of the weight.
        weights: of one matrix.
        bits: see ``Format``.
        tokens: rows of x; each goes to ``routed`` experts when there are any.
        nbytes: stored bytes that the product has to read: of the matrix, or of the experts that are routed to.
        seconds: of the compressed product.
        peers: seconds of the others, by name.
        errors: why one of them (or ours, as ``ciuic``) has no time.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    bits: float
    tokens: int
    nbytes: int
    seconds: float | None
    peers: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}, {self.bits:g} bits, {self.tokens} tokens"

    @property
    def bandwidth(self) -> float | None:
        """Stored bytes per second."""
        return None if self.seconds is None else self.nbytes / self.seconds

    def ratio(self, peer: str = CUBLAS) -> float | None:
        """How many times faster than a peer."""
        other = self.peers.get(peer)
        return None if other is None or self.seconds is None else other / self.seconds


def measure_shape(
    shape: WeightShape,
    formats: Sequence[Format],
    tokens: Sequence[int],
    timer: Timer,
    device: torch.device,
    peers: Sequence[Peer] = (),
) -> Iterator[ProductRow]:
    """A row for each format and number of tokens; cuBLAS and the peers are timed beside each.

    Raises:
        torch.OutOfMemoryError: when the weight and its dense copy do not fit.
    """
    dense = random_weight(shape.shape, device)
    others: dict[str, Product] = {}
    errors: dict[str, str] = {}
    for peer in peers if not shape.experts else ():
        try:
            others[peer.name] = prepared(peer, dense)
        except Exception as error:
            errors[peer.name] = said_by(error)
    for form in formats:
        operand = random_operand(shape, form.setting, device)
        if use_triton(device):
            _compile(shape, operand, tokens, device)
        for count in tokens:
            x = activations(count, shape.cols, torch.bfloat16, device)
            if shape.experts:
                ids = routing(count, shape, device)
                ours, theirs = _experts_calls(shape, operand, dense, x, ids)
                matrices = len(ids.unique())
            else:
                ours = partial(ops.linear, x, *operand.stored, None, shape.rows, shape.cols)
                theirs = {CUBLAS: partial(cublas(dense), x)}
                theirs |= {name: partial(product, x) for name, product in others.items()}
                matrices = 1
            row = ProductRow(
                shape.name, shape.shape, shape.weights, form.bits, count,
                operand.packed.nbytes * matrices // max(1, shape.experts), None, errors=dict(errors),
            )  # fmt: skip
            _fill(row, ours, theirs, timer)
            yield row


def _compile(shape: WeightShape, operand: Operand, tokens: Sequence[int], device: torch.device) -> None:
    """Compile side by side what the products will start; nothing is computed."""
    from ciuic_kernels.triton._launch import compiling  # imports Triton

    with compiling(processors()), torch.inference_mode():
        for count in tokens:
            x = activations(count, shape.cols, torch.bfloat16, device)
            if shape.experts:
                ids = routing(count, shape, device)
                ops.expert_linear(x, ids, *operand.stored, shape.rows, shape.cols)
            else:
                ops.linear(x, *operand.stored, None, shape.rows, shape.cols)


def _fill(row: ProductRow, ours: Call, theirs: dict[str, Call], timer: Timer) -> None:
    """Times and errors of one comparison."""
    with torch.inference_mode():
        mine, *others = timer.medians([ours, *theirs.values()])
    row.seconds = mine.seconds
    if mine.seconds is None:
        row.errors["ciuic"] = mine.error
    for name, timing in zip(theirs, others, strict=True):
        if timing.seconds is None:
            row.errors[name] = timing.error
        else:
            row.peers[name] = timing.seconds


def _experts_calls(
    shape: WeightShape, operand: Operand, dense: torch.Tensor, x: torch.Tensor, ids: torch.Tensor
) -> tuple[Call, dict[str, Call]]:
    """Our product of routed rows; and cuBLAS expert by expert, with rows sorted and counted beforehand."""
    ours = partial(ops.expert_linear, x, ids, *operand.stored, shape.rows, shape.cols)
    order = ids.flatten().sort(stable=True)
    rows = x[order.indices // shape.routed].contiguous()
    experts, counts = order.values.unique_consecutive(return_counts=True)
    pieces = list(zip(experts.tolist(), rows.split(counts.tolist()), strict=True))

    def one_by_one() -> list[torch.Tensor]:
        return [torch.nn.functional.linear(piece, dense[expert]) for expert, piece in pieces]

    return ours, {CUBLAS: one_by_one}


def installed_peers() -> tuple[list[Peer], list[str]]:
    """Those that can be imported, and the names of the others."""
    return [p for p in PEERS if p.installed], [p.name for p in PEERS if not p.installed]


def fitting(shape: WeightShape, free_nbytes: int) -> WeightShape:
    """The shape with so many experts that its dense copy takes at most a quarter of the memory."""
    if not shape.experts:
        return shape
    most = max(shape.routed, free_nbytes // 4 // (2 * shape.weights))
    count = min(shape.experts, most)
    return WeightShape(shape.name, shape.rows, shape.cols, count, shape.routed)
