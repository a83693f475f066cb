"""Measuring sensitivities: what the weights of a model do to its own predictions.

Tokens go through the model once. At every position a label is drawn from the model's own prediction, and one
backward pass gives the gradient g of its log-likelihood at the output of each Linear and expert, of which x was the
input. The Fisher diagonal of weight (i, j), the mean of ``(g_i x_j)^2`` over tokens, is summed over blocks without
ever being formed: ``sum over tokens of (sum of g_i^2 in a strip) * (sum of x_j^2 in a block of columns)``. Tokens are
treated as independent, as in K-FAC (Martens and Grosse, arXiv 1503.05671). No gradient of a weight is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, pad

from ciuic_hf.errors import CiuicError
from ciuic_hf.modules.experts import EXPERT_PARAMETERS, is_fused_experts, unsupported_reason
from ciuic_hf.planning.sensitivity import Sensitivity
from ciuic_kernels.format import BLOCK_COLS, BLOCK_ROWS, ceil_div

SEQUENCE = 128  # tokens that see each other
FLOOR = 0.01  # of a parameter's mean: what a block counts at least, so that no expert that met no token is given up


def block_sums(values: Tensor, size: int) -> Tensor:
    """``[..., n] -> [..., ceil(n / size)]``, sums of runs of ``size``."""
    length = values.shape[-1]
    padded = pad(values, (0, -length % size))
    return padded.unflatten(-1, (ceil_div(length, size), size)).sum(-1)


class _Energy:
    """Sums Fisher energies of blocks as gradients arrive: parameter name -> float32 ``[..., strips, kblocks]``."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def prepare(self, name: str, weight: Tensor) -> None:
        grid = (ceil_div(weight.shape[-2], BLOCK_ROWS), ceil_div(weight.shape[-1], BLOCK_COLS))
        self.sums[name] = torch.zeros(*weight.shape[:-2], *grid, device=weight.device)

    def watch(self, name: str, x: Tensor, y: Tensor, expert: int | None = None) -> None:
        """Add what flows back through ``y = x W^T``, x ``[..., K]`` and y ``[..., N]``."""
        if not y.requires_grad:
            return
        inputs = block_sums(x.detach().flatten(0, -2).float().square(), BLOCK_COLS)

        def arrived(gradient: Tensor) -> None:
            outputs = block_sums(gradient.flatten(0, -2).float().square(), BLOCK_ROWS)
            total = self.sums[name] if expert is None else self.sums[name][expert]
            total += outputs.T @ inputs

        y.register_hook(arrived)


@contextmanager
def _watched(model: nn.Module) -> Iterator[_Energy]:
    """The model with everything in place to measure; as it was afterwards."""
    energy = _Energy()
    with ExitStack() as undo:
        for name, module in model.named_modules():
            if type(module) is nn.Linear:
                energy.prepare(f"{name}.weight", module.weight)
                hook = module.register_forward_hook(partial(_linear_ran, energy, f"{name}.weight"))
                undo.callback(hook.remove)
            elif is_fused_experts(module) and not unsupported_reason(module):
                for parameter in EXPERT_PARAMETERS:
                    energy.prepare(f"{name}.{parameter}", module.get_parameter(parameter))
                module.__dict__["forward"] = partial(_experts_forward, energy, name, module)
                undo.callback(module.__dict__.pop, "forward")
        for weight in model.parameters():
            undo.callback(weight.requires_grad_, weight.requires_grad)
            weight.requires_grad_(False)
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        undo.callback(embeddings.register_forward_hook(lambda _m, _i, out: out.requires_grad_(True)).remove)
        yield energy


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
        energy.watch(f"{name}.gate_up_proj", hidden[token], gate_up, expert)
        gated = module._apply_gate(gate_up)
        down = linear(gated, module.down_proj[expert])
        energy.watch(f"{name}.down_proj", gated, down, expert)
        out = out.index_add(0, token, (down * top_k_weights[token, place, None]).to(out.dtype))
    return out


def own_text(model: Any, tokens: int) -> Tensor:
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
            out = model(input_ids=last, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            last = _draw(out.logits[:, -1], generator)
            ids = torch.cat([ids, last], dim=1)
    return ids.clone()


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """int64 ``[B, 1]``, one token of each row of logits ``[B, V]``."""
    probabilities = torch.softmax(logits.detach().float(), dim=-1).cpu()
    return torch.multinomial(probabilities, 1, generator=generator).to(logits.device)


def measure(
    model: Any, ids: Tensor, source: str, done: Callable[[int], object] = lambda _n: None
) -> Sensitivity:
    """The sensitivity of every block of every Linear and fused expert.

    Args:
        model: a causal language model in evaluation mode, not compressed.
        ids: int64 ``[S, n]``, each row by itself.
        source: kept in the result.
        done: told how many rows are done after each.

    Raises:
        CiuicError: when the model gives no finite gradients, or has nothing to measure.
    """
    generator = torch.Generator().manual_seed(1)
    with _watched(model) as energy, torch.enable_grad():
        if not energy.sums:
            raise CiuicError(
                f"{type(model).__name__} has no Linear and no fused experts whose weights could be measured."
            )
        for i, row in enumerate(ids):
            logits = model(input_ids=row[None], use_cache=False).logits[0].float()
            labels = _draw(logits, generator)[:, 0]
            cross_entropy(logits, labels, reduction="sum").backward()
            done(i + 1)
        blocks = {
            name: _sensitivity(name, total / ids.numel(), model.get_parameter(name))
            for name, total in energy.sums.items()
        }
    return Sensitivity(blocks, source, ids.numel())


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
