"""Compiling the GPU kernels of a model before they are needed."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from ciuic_hf.modules.embedding import CiuicEmbedding
from ciuic_hf.modules.experts import CiuicExperts
from ciuic_hf.modules.linear import CiuicLinear
from ciuic_hf.modules.packed import PackedModule
from ciuic_hf.modules.siblings import multiply
from ciuic_hf.runtime.cache.rehearsal import CachedAttention
from ciuic_kernels.device import device_facts
from ciuic_kernels.selection import EXPERTS, LINEAR, SHARED_BLOCK_M
from ciuic_kernels.tuning import rules_for, triton_minor
from ciuic_kernels.work import ROUTED_SLOTS

MOST_TOKENS = 512
"""Launches that only more tokens need are left to the first that come: a rehearsal allocates its results."""


def compile_kernels(
    modules: Iterable[PackedModule],
    dtype: torch.dtype,
    routed: int,
    workers: int | None = None,
    attention: CachedAttention | None = None,
) -> int:
    """Compile what the products of these modules start at up to ``MOST_TOKENS`` tokens; no product is computed.

    With a compressed cache, also what attention of one new token to it starts on any of their devices.

    Modules that need the same kernels are rehearsed once, and so are linears that share launches. Kernels of earlier
    runs come from Triton's cache.

    Args:
        modules: on devices that the Triton kernels serve.
        dtype: of the activations, float16 or bfloat16.
        routed: experts of a token.
        workers: kernels compiled at a time; as many as this process has processors by default.
        attention: to the compressed cache that the model will have, None without one.

    Returns:
        how many different kernels there were.
    """
    from ciuic_kernels.triton._launch import compiling  # imports Triton

    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    modules = list(modules)
    distinct = {_needs(module): module for module in modules}
    groups = {tuple(map(_needs, group)): group for group in _groups(modules)}
    with compiling(workers) as compiled, torch.no_grad():
        if attention is not None:
            for device in {_device(module) for module in modules}:
                attention.rehearse(dtype, device)
        for module in distinct.values():
            for tokens in _tokens(module, routed):
                _rehearse(module, tokens, dtype, routed)
        for group in groups.values():
            for tokens in _tokens(group[0], routed):
                if tokens <= SHARED_BLOCK_M:
                    multiply(group, _inputs(group[0], tokens, dtype))
    return len(compiled)


def _groups(modules: Iterable[PackedModule]) -> list[list[CiuicLinear]]:
    linears = [m for m in modules if isinstance(m, CiuicLinear) and m._siblings is not None]
    siblings = {id(m._siblings[0]): m._siblings[0] for m in linears if m._siblings is not None}
    return [members for group in siblings.values() if (members := group.members())]


def _tokens(module: PackedModule, routed: int) -> list[int]:
    """The smallest number of tokens for each launch that the rules of the module's device can choose."""
    if isinstance(module, CiuicEmbedding):
        return [1]
    rules = rules_for(device_facts(_device(module)).name, triton_minor())
    if isinstance(module, CiuicExperts):
        experts = module.packed_shapes["gate_up_proj"][0]
        limits = {rule.max_tokens for rule in rules if rule.op == EXPERTS}
        smallest = {1 + limit * experts // routed for limit in limits} | {1 + ROUTED_SLOTS // routed}
    else:
        smallest = {1 + rule.max_tokens for rule in rules if rule.op == LINEAR}
    return sorted(tokens for tokens in smallest | {1} if tokens <= MOST_TOKENS)


def _device(module: PackedModule) -> torch.device:
    return next(module.parameters()).device


def _needs(module: PackedModule) -> tuple[object, ...]:
    """Equal for modules that start the same kernels."""
    bias = getattr(module, "bias", None)
    return (
        type(module),
        *module.packed_shapes.items(),
        *(tuple(module.derived(name).kinds) for name in module.packed_shapes),
        module.dense_dtype,
        bias.dtype if isinstance(bias, torch.Tensor) else None,
        _device(module),
    )


def _rehearse(module: PackedModule, tokens: int, dtype: torch.dtype, routed: int) -> None:
    device = _device(module)
    if isinstance(module, CiuicEmbedding):
        module(torch.zeros(tokens, dtype=torch.int64, device=device))
    elif isinstance(module, CiuicExperts):
        hidden = module.packed_shapes["gate_up_proj"][-1]
        ids = torch.zeros(tokens, routed, dtype=torch.int64, device=device)
        x = torch.zeros(tokens, hidden, dtype=dtype, device=device)
        module(x, ids, torch.zeros(tokens, routed, dtype=dtype, device=device))
    elif isinstance(module, CiuicLinear):
        module.product(_inputs(module, tokens, dtype))


def _inputs(linear: CiuicLinear, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(tokens, linear.in_features, dtype=dtype, device=_device(linear))
