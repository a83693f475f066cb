"""Gradients in compressed form: one at a time, and all of a model between micro-batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn, Protocol, Self

import torch
from torch import Tensor, nn

from ciuic_hf.errors import CiuicError
from ciuic_hf.runtime.stochastic import BITS, PackedOrExact, pack, unpack

# Values that share a scale of two bytes: 8.125, 4.25 and 2.5 bits in all.
SIGNED_GROUPS = {8: 128, 4: 64, 2: 32}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_STEP_NBYTES = 64 << 20


class Compressor(Protocol):
    """What ``CompressedGradient`` needs: a ``CiuicCompressor`` or a ``StochasticCompressor``."""

    def compress_tensor(self, tensor: Tensor, /) -> Any:
        """Something with ``nbytes``."""

    def decompress_tensor(self, compressed: Any, /) -> Tensor:
        """A new tensor."""


class StochasticTensor(PackedOrExact):
    """What ``StochasticCompressor`` makes."""


class StochasticCompressor:
    """Fast compressor for gradients: groups with one scale each, no search, zero stays zero.

    Args:
        bits: 8, 4 or 2; 8.125, 4.25 or 2.5 in all.
        stochastic: unbiased rounding, from a generator of its own. False rounds to the nearest, which is half as
            much noise, and biased; right where an error feedback follows.
        seed: of the rounding.

    Raises:
        CiuicError: for other bits.
    """

    def __init__(self, bits: int = 8, *, stochastic: bool = True, seed: int = 0) -> None:
        _check_bits("bits", bits, BITS)
        self.bits, self.stochastic, self.seed = bits, stochastic, seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __repr__(self) -> str:
        return f"StochasticCompressor(bits={self.bits}, stochastic={self.stochastic})"

    def compress_tensor(self, tensor: Tensor) -> StochasticTensor:
        """float32, float16 or bfloat16 of any shape; NaN and infinity are kept, with everything else, exactly."""
        _check_gradient(tensor)
        values = tensor.detach().contiguous()
        groups = pack(
            values.flatten(), self.bits, SIGNED_GROUPS[self.bits], self._generator(tensor.device), signed=True
        )
        exact = values.clone() if groups is None else None
        return StochasticTensor(tensor.shape, tensor.dtype, groups, exact)

    def decompress_tensor(self, compressed: StochasticTensor) -> Tensor:
        """A new tensor of the source's shape and dtype."""
        if compressed.groups is None:
            assert compressed.exact is not None
            return compressed.exact.clone()
        return unpack(compressed.groups).view(compressed.shape)

    def _generator(self, device: torch.device) -> torch.Generator | None:
        if not self.stochastic:
            return None
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]


class CompressedGradient:
    """A gradient in compressed form that others can be added to.

        gradient = CompressedGradient(StochasticCompressor(bits=8, stochastic=False), parameter.grad)
        gradient.add_(another)
        parameter.grad = gradient.decompress()

    What the compressor rounds off is kept as a residual of ``feedback_bits``, and comes back in the next ``add_``
    and in ``decompress``. Without it every addition rounds the whole sum anew, and the errors add up.

    Args:
        compressor: ``CiuicCompressor``, ``StochasticCompressor``, or anything with their two methods.
        original_grad: float32, float16 or bfloat16, any shape. Sums are rounded to float32.
        feedback_bits: 8, 4 or 2, or 0 for none; 8.125, 4.25 or 2.5 bits in all, on top of the compressor's.

    Raises:
        CiuicError: for another dtype or layout, and whatever the compressor refuses.
    """

    def __init__(self, compressor: Compressor, original_grad: Tensor, *, feedback_bits: int = 4) -> None:
        _check_bits("feedback_bits", feedback_bits, (*BITS, 0))
        _check_gradient(original_grad)
        self.compressor, self.shape, self.dtype = compressor, original_grad.shape, original_grad.dtype
        self._feedback = StochasticCompressor(feedback_bits) if feedback_bits else None
        self._set(original_grad.detach().float())

    def __repr__(self) -> str:
        return f"CompressedGradient({list(self.shape)}, {self.dtype}, {self.nbytes} bytes)"

    @property
    def nbytes(self) -> int:
        """Everything stored, the residual too."""
        return int(self.compressed.nbytes) + (self.residual.nbytes if self.residual is not None else 0)

    def decompress(self) -> Tensor:
        """A new tensor of the shape and dtype of the gradient; editing it changes nothing here."""
        return self._sum().to(self.dtype)

    def add_(self, other: Tensor | CompressedGradient) -> Self:
        """Adds a gradient of the same shape, and compresses the sum; if that fails, nothing has changed."""
        if not isinstance(other, CompressedGradient):
            _check_gradient(other)
        if other.shape != self.shape:
            raise CiuicError(f"A gradient {list(other.shape)} cannot be added to one of {list(self.shape)}.")
        total = self._sum()
        total += other._sum() if isinstance(other, CompressedGradient) else other.detach()
        self._set(total)
        return self

    __iadd__ = add_

    def _sum(self) -> Tensor:
        total = self.compressor.decompress_tensor(self.compressed)
        if self.residual is not None:
            assert self._feedback is not None
            total += self._feedback.decompress_tensor(self.residual)
        return total

    def _set(self, total: Tensor) -> None:
        compressed = self.compressor.compress_tensor(total)
        residual = None
        if self._feedback is not None:
            error = total - self.compressor.decompress_tensor(compressed)
            # inf - inf: where the compressor kept everything there is nothing to feed back
            if bool(torch.isfinite(error).all()):
                residual = self._feedback.compress_tensor(error)
        self.compressed, self.residual = compressed, residual

    def __getattr__(self, name: str) -> NoReturn:
        if name.endswith("_") and not name.startswith("_"):
            _refuse_edit(f"{name}()")
        raise AttributeError(f"A CompressedGradient has no {name}; decompress() gives a tensor.")

    def __setitem__(self, index: object, value: object) -> NoReturn:
        _refuse_edit("an assignment to its elements")

    def __imul__(self, other: object) -> NoReturn:
        _refuse_edit("*=")

    def __isub__(self, other: object) -> NoReturn:
        _refuse_edit("-=")

    def __itruediv__(self, other: object) -> NoReturn:
        _refuse_edit("/=")


class GradientAccumulator:
    """What ``compress_gradients`` returns: the sums of a model's gradients, compressed between micro-batches."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], bits: int, feedback_bits: int, min_numel: int
    ) -> None:
        self._compressor = StochasticCompressor(bits, stochastic=not feedback_bits)
        self._feedback_bits, self._min_numel = feedback_bits, min_numel
        self._sums: dict[nn.Parameter, CompressedGradient | Tensor] = {}
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._take)
            for parameter in dict.fromkeys(parameters)
            if parameter.requires_grad
        ]

    @property
    def nbytes(self) -> int:
        """Held now."""
        return sum(total.nbytes for total in self._sums.values())

    @property
    def original_nbytes(self) -> int:
        """What the same gradients take in ``.grad``."""
        return sum(parameter.nbytes for parameter in self._sums)

    def restore(self) -> None:
        """Puts every sum into ``.grad`` and starts anew: call it before clipping and ``optimizer.step()``."""
        for parameter in list(self._sums):
            self._restore_one(parameter)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """``restore()``, ``optimizer.step()`` and ``zero_grad()`` with a few gradients at a time in full.

        For optimizers that treat each parameter by itself and skip those without a gradient, as those of torch do
        (LBFGS does not).

        Raises:
            CiuicError: if one of its parameters has a gradient already.
        """
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            raise CiuicError(
                "A parameter of this optimizer has a gradient beside the compressed ones, and would be stepped more "
                "than once; clear it, or use restore() and optimizer.step()."
            )
        waiting, nbytes = [], 0
        for parameter in list(self._sums):
            self._restore_one(parameter)
            waiting.append(parameter)
            nbytes += parameter.nbytes
            if nbytes >= _STEP_NBYTES or not self._sums:
                optimizer.step()
                for stepped in waiting:
                    stepped.grad = None
                waiting, nbytes = [], 0

    def clear(self) -> None:
        """Forgets the sums; ``optimizer.zero_grad()`` does not see them."""
        self._sums.clear()

    def remove(self) -> None:
        """Takes the hooks off; what is held stays until ``restore()``."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.remove()
        if kind is None:
            self.restore()

    def _take(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        gradient, known = parameter.grad, self._sums.get(parameter)
        assert gradient is not None
        if gradient.layout != torch.strided or type(gradient) is not Tensor:
            raise CiuicError(
                f"The gradient of a parameter {list(parameter.shape)} is not a dense tensor and cannot be compressed; "
                "use dense gradients (sparse=False), or FSDP's and DDP's own accumulation."
            )
        parameter.grad = None
        if known is not None:
            known.add_(gradient)
        elif gradient.numel() < self._min_numel or gradient.dtype not in _DTYPES:
            self._sums[parameter] = gradient
        else:
            self._sums[parameter] = CompressedGradient(
                self._compressor, gradient, feedback_bits=self._feedback_bits
            )

    def _restore_one(self, parameter: nn.Parameter) -> None:
        total = self._sums.pop(parameter)
        gradient = total.decompress() if isinstance(total, CompressedGradient) else total
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def compress_gradients(
    model: nn.Module, *, bits: int = 8, feedback_bits: int = 4, min_numel: int = 1024
) -> GradientAccumulator:
    """Keeps the gradients of a model compressed from one backward pass to the next; ``.grad`` is None meanwhile.

        accumulator = compress_gradients(model, bits=8)
        for batch in micro_batches:
            model(**batch).loss.backward()
        accumulator.restore()
        optimizer.step()

    As a context it restores and ends itself at the end. In full there is one gradient at a time in the backward
    pass, and all of them after ``restore()``; ``accumulator.step(optimizer)`` avoids the latter.

    Args:
        bits, feedback_bits: as in ``StochasticCompressor`` and ``CompressedGradient``; rounding is stochastic
            without a feedback, and to the nearest with one.
        min_numel: gradients of fewer elements are summed as they are.

    Raises:
        CiuicError: for other bits, a model under DistributedDataParallel, gradients that exist already.
    """
    _check_bits("bits", bits, BITS)
    _check_bits("feedback_bits", feedback_bits, (*BITS, 0))
    if not isinstance(model, nn.Module):
        raise CiuicError(f"Expected a torch module, got {type(model).__name__}.")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise CiuicError(
            "DistributedDataParallel sums gradients in buckets of its own, outside of this hook's reach; use "
            "compress_communication(model) for it."
        )
    if any(parameter.grad is not None for parameter in model.parameters()):
        raise CiuicError(
            "The model has gradients already; call zero_grad() first, so that none is counted twice."
        )
    return GradientAccumulator(model.parameters(), bits, feedback_bits, min_numel)


def _check_bits(name: str, bits: object, allowed: tuple[int, ...]) -> None:
    if isinstance(bits, bool) or bits not in allowed:
        choices = ", ".join(map(str, sorted(allowed, reverse=True)))
        raise CiuicError(f"{name} is one of {choices}, got {bits!r}.")


def _check_gradient(gradient: object) -> None:
    if not isinstance(gradient, Tensor) or gradient.layout != torch.strided or gradient.dtype not in _DTYPES:
        what = (
            f"{gradient.dtype} {gradient.layout}" if isinstance(gradient, Tensor) else type(gradient).__name__
        )
        raise CiuicError(f"A gradient is a dense tensor of float32, float16 or bfloat16, got {what}.")


def _refuse_edit(what: str) -> NoReturn:
    raise CiuicError(
        f"A compressed gradient takes add_() and no other edit in place, got {what}; edit what decompress() returns, "
        "and compress that."
    )
