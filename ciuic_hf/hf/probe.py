"""Measuring a model: what its weights do to its own predictions, and what they are multiplied with.

Tokens go through the model once. At every position a label is drawn from the model's own prediction, and one
backward pass gives the gradient g of its log-likelihood at the output of each Linear and expert, of which x was the
input. The Fisher diagonal of weight (i, j), the mean of ``(g_i x_j)^2`` over tokens, is summed over blocks without
ever being formed: ``sum over tokens of (sum of g_i^2 in a strip) * (sum of x_j^2 in a block of columns)``. Tokens are
treated as independent, as in K-FAC (Martens and Grosse, arXiv 1503.05671). No gradient of a weight is computed.

The same gradients weigh tokens in the second moments of the inputs, ``E[|g|^2 x x^T]``, by which codes are rounded:
among second-order models of the loss the one that is a product of a matrix and a weight for each token (GuidedQuant,
Kim et al., arXiv 2505.07004). Matrices that share an input share its moments, and |g|^2 is their sum.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, pad

from ciuic_hf.errors import CiuicError
from ciuic_hf.hf.cache_name import cache_name
from ciuic_hf.hf.decoder_layers import decoder_layers, in_memory, layer_by_layer
from ciuic_hf.modules.experts import EXPERT_PARAMETERS, is_fused_experts, unsupported_reason
from ciuic_hf.planning.moments import Moments
from ciuic_hf.planning.sensitivity import Sensitivity
from ciuic_kernels.format import BLOCK_COLS, BLOCK_ROWS, ceil_div

SEQUENCE = 128  # tokens that see each other
FLOOR = 0.01  # of a parameter's mean: what a block counts at least, so that no expert that met no token is given up
FEWEST_TOKENS = 32  # that an expert must have met before its rounding follows them


def block_sums(values: Tensor, size: int) -> Tensor:
    """``[..., n] -> [..., ceil(n / size)]``, sums of runs of ``size``."""
    length = values.shape[-1]
    padded = pad(values, (0, -length % size))
    return padded.unflatten(-1, (ceil_div(length, size), size)).sum(-1)


@dataclass
class _Input:
    """An input of the layer at hand: rows ``[T, K]``, the weight of each, and the matrices that read it."""

    rows: Tensor
    weights: Tensor
    readers: dict[str, None] = field(default_factory=dict)


class _Energy:
    """Sums Fisher energies of blocks as gradients arrive, and finishes what belongs to a layer with the layer.

    Attributes:
        sums: parameter -> float32 ``[..., strips, kblocks]``, those that are not finished.
        blocks: parameter -> sensitivities, those that are.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: int,
        moments: Moments | None,
        present: Callable[[str, nn.Module], AbstractContextManager[Any]],
    ) -> None:
        self.model, self.tokens, self.moments, self.present = model, tokens, moments, present
        self.sums: dict[str, Tensor] = {}
        self.blocks: dict[str, Tensor] = {}
        self._inputs: dict[tuple[int, int], _Input] = {}
        self._within: str | None = None

    def prepare(self, name: str, weight: Tensor, device: torch.device) -> None:
        grid = (ceil_div(weight.shape[-2], BLOCK_ROWS), ceil_div(weight.shape[-1], BLOCK_COLS))
        self.sums[name] = torch.zeros(*weight.shape[:-2], *grid, device=device)

    def watch(
        self,
        name: str,
        x: Tensor,
        y: Tensor,
        expert: int | None = None,
        of: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Add what flows back through ``y = x W^T``, x ``[..., K]`` and y ``[..., N]``.

        Args:
            of: where x was taken from, ``[T, K]``, and by which rows: all experts then share its moments.
        """
        if not y.requires_grad:
            return
        x = x.detach().flatten(0, -2)
        inputs = block_sums(x.float().square(), BLOCK_COLS)
        source, rows = (of[0].detach(), of[1]) if of else (x, None)
        shared = self._input(source, name if expert is None or of else f"{name}/{expert}")

        def arrived(gradient: Tensor) -> None:
            squares = gradient.flatten(0, -2).float().square()
            total = self.sums[name] if expert is None else self.sums[name][expert]
            total += block_sums(squares, BLOCK_ROWS).T @ inputs
            if shared is not None and rows is not None:
                shared.weights.index_add_(0, rows, squares.sum(1))
            elif shared is not None:
                shared.weights += squares.sum(1)

        y.register_hook(arrived)

    def _input(self, rows: Tensor, reader: str) -> _Input | None:
        """The input with these rows, which ``reader`` reads too; None when moments are not wanted here."""
        if self.moments is None or self._within is None:
            return None
        key = (rows.data_ptr(), rows.numel())
        found = self._inputs.setdefault(key, _Input(rows, torch.zeros(len(rows), device=rows.device)))
        found.readers[reader] = None
        return found

    @contextmanager
    def entered(self, name: str, layer: nn.Module) -> Iterator[None]:
        """The visit of a layer that :mod:`ciuic_hf.hf.decoder_layers` asks for."""
        self._within = name
        with self.present(name, layer):
            yield
        self._within = None

    def finished(self, name: str, _layer: nn.Module | None = None) -> None:
        """Turn what was summed inside a module, ``""`` for the model, into results, and forget it."""
        for parameter in [p for p in self.sums if not name or p.startswith(f"{name}.")]:
            fisher = self.sums.pop(parameter) / self.tokens
            self.blocks[parameter] = _sensitivity(parameter, fisher, self.model.get_parameter(parameter))
        for found in self._inputs.values():
            self._keep(found)
        self._inputs.clear()

    def _keep(self, found: _Input) -> None:
        """Store the moments of an input, unless nothing flowed back or an expert met hardly a token."""
        name = next(iter(found.readers))
        met = found.weights > 0
        if int(met.sum()) < (FEWEST_TOKENS if "/" in name else 1):
            return
        rows = found.rows[met].float() * (found.weights[met, None] / self.tokens).sqrt()
        if not bool(rows.isfinite().all()):
            raise CiuicError(f"The inputs of {name} are not finite; load the model in float32 or bfloat16.")
        assert self.moments is not None
        self.moments.keep(name, rows)
        self.moments.inputs |= dict.fromkeys(found.readers, name)


class _Visitor:
    """What :mod:`ciuic_hf.hf.decoder_layers` does at each layer, with a count of the steps."""

    def __init__(self, energy: _Energy, step: Callable[[], None]) -> None:
        self.energy, self.step = energy, step

    @contextmanager
    def present(self, name: str, layer: nn.Module) -> Iterator[None]:
        with self.energy.entered(name, layer):
            yield
        self.step()

    def finished(self, name: str, layer: nn.Module) -> None:
        self.energy.finished(name, layer)


@contextmanager
def _watched(model: nn.Module, energy: _Energy, device: torch.device) -> Iterator[None]:
    """The model with everything in place to measure; as it was afterwards."""
    with ExitStack() as undo:
        for name, module in model.named_modules():
            if type(module) is nn.Linear:
                energy.prepare(f"{name}.weight", module.weight, device)
                hook = module.register_forward_hook(partial(_linear_ran, energy, f"{name}.weight"))
                undo.callback(hook.remove)
            elif is_fused_experts(module) and not unsupported_reason(module):
                for parameter in EXPERT_PARAMETERS:
                    energy.prepare(f"{name}.{parameter}", module.get_parameter(parameter), device)
                module.__dict__["forward"] = partial(_experts_forward, energy, name, module)
                undo.callback(module.__dict__.pop, "forward")
        for weight in model.parameters():
            undo.callback(weight.requires_grad_, weight.requires_grad)
            weight.requires_grad_(False)
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        undo.callback(embeddings.register_forward_hook(lambda _m, _i, out: out.requires_grad_(True)).remove)
        yield


def _linear_ran(
    energy: _Energy, name: str, _module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor
) -> None:
    energy.watch(name, inputs[0], y)


def _experts_forward(
    energy: _Energy, name: str, module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Fused experts one by one: hidden ``[T, H]``, ids and weights ``[T, k]`` -> ``[T, H]``."""
    out = torch.zeros_like(hidden)
    for expert in top_k_index.unique().tolist():
        if expert >= len(module.gate_up_proj):
            continue
        token, place = (top_k_index == expert).nonzero(as_tuple=True)
        gate_up = linear(hidden[token], module.gate_up_proj[expert])
        energy.watch(f"{name}.gate_up_proj", hidden[token], gate_up, expert, (hidden, token))
        gated = module._apply_gate(gate_up)
        down = linear(gated, module.down_proj[expert])
        energy.watch(f"{name}.down_proj", gated, down, expert)
        out = out.index_add(0, token, (down * top_k_weights[token, place, None]).to(out.dtype))
    return out


def own_text(model: Any, tokens: int, done: Callable[[float], object] = lambda _share: None) -> Tensor:
    """Tokens that the model writes by itself, drawn at temperature 1 from random first tokens: int64 ``[S, SEQUENCE]``.

    Deterministic for a given model and machine.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    count = ceil_div(tokens, SEQUENCE)
    ids = torch.randint(model.config.get_text_config().vocab_size, (count, 1), generator=generator).to(device)
    cache, last = None, ids
    with torch.inference_mode():
        while ids.shape[1] < SEQUENCE:
            out = model(input_ids=last, use_cache=True, **{cache_name(): cache})
            cache = out[cache_name()]
            last = _draw(out.logits[:, -1], generator)
            ids = torch.cat([ids, last], dim=1)
            done(ids.shape[1] / SEQUENCE)
    return ids.clone()


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """int64 ``[B, 1]``, one token of each row of logits ``[B, V]``."""
    probabilities = torch.softmax(logits.detach().float(), dim=-1).cpu()
    return torch.multinomial(probabilities, 1, generator=generator).to(logits.device)


def measure(
    model: Any,
    ids: Tensor,
    source: str,
    done: Callable[[float], object] = lambda _share: None,
    moments: Moments | None = None,
    present: Callable[[str, nn.Module], AbstractContextManager[Any]] = in_memory,
) -> Sensitivity:
    """The sensitivity of every block of every Linear and fused expert.

    Layers are gone through one by one, with all tokens: of the activations those inside one layer are held, and the
    hidden states between layers.

    Args:
        model: a causal language model in evaluation mode, not compressed.
        ids: int64 ``[S, n]``, each row by itself.
        source: kept in the result.
        done: told the share of the work that is done, after each part.
        moments: filled with the moments of the inputs of all matrices inside layers, if given.
        present: around every use of a layer, given its name and module: loads its weights where they are not there.

    Raises:
        CiuicError: when the model gives no finite gradients, or has nothing to measure.
    """
    generator = torch.Generator().manual_seed(1)
    energy = _Energy(model, ids.numel(), moments, present)
    steps, taken = 2 * len(decoder_layers(model)) + len(ids), 0

    def step() -> None:
        nonlocal taken
        taken += 1
        done(taken / steps)

    with (
        _watched(model, energy, ids.device),
        layer_by_layer(model, _Visitor(energy, step)),
        torch.enable_grad(),
    ):
        if not energy.sums:
            raise CiuicError(
                f"{type(model).__name__} has no Linear and no fused experts whose weights could be measured."
            )
        below = model.base_model(input_ids=ids, use_cache=False)
        hidden = below.last_hidden_state
        top = hidden.detach().requires_grad_()
        for i, row in enumerate(ids):
            logits = _head(model, row[None], below, top[i : i + 1]).float()
            labels = _draw(logits, generator)[:, 0]
            cross_entropy(logits, labels, reduction="sum").backward()
            step()
        hidden.backward(top.grad)
        energy.finished("")
    return Sensitivity(energy.blocks, source, ids.numel())


def _head(model: Any, ids: Tensor, below: Any, hidden: Tensor) -> Tensor:
    """Logits ``[n, V]`` for the hidden states ``[1, n, H]`` of one row.

    Args:
        ids: int64 ``[1, n]``, the row.
        below: what the model without its head gave for all rows.
    """
    base, output = model.base_model, copy.copy(below)
    output.last_hidden_state = hidden
    base.__dict__["forward"] = lambda *_args, **_kwargs: output
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    finally:
        del base.__dict__["forward"]
    return logits


def _sensitivity(name: str, fisher: Tensor, weight: Tensor) -> Tensor:
    """``1/2 sum(F) mean(W^2)`` of every block, floored, on the CPU; ``fisher`` holds ``sum(F)`` of every block."""
    values = torch.empty(fisher.shape)
    rows, cols = (
        block_sums(torch.ones(n), size)
        for n, size in zip(weight.shape[-2:], (BLOCK_ROWS, BLOCK_COLS), strict=True)
    )
    matrices = weight if weight.dim() == 3 else weight[None]
    for index, matrix in enumerate(matrices):
        squares = block_sums(matrix.float().square(), BLOCK_COLS)
        energy = block_sums(squares.T, BLOCK_ROWS).T
        here = 0.5 * (fisher[index] if weight.dim() == 3 else fisher) * energy
        (values[index] if weight.dim() == 3 else values).copy_(here.cpu() / (rows[:, None] * cols))
    if not bool(values.isfinite().all()):
        raise CiuicError(f"The gradients of {name} are not finite; load the model in float32 or bfloat16.")
    return values.clamp(min=max(FLOOR * float(values.mean()), 1e-12))
