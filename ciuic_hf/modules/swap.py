"""Swapping compressed modules into a model and out again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ciuic_hf.errors import CiuicError
from ciuic_hf.modules.embedding import CiuicEmbedding
from ciuic_hf.modules.experts import adopt_experts, is_fused_experts
from ciuic_hf.modules.linear import CiuicLinear
from ciuic_hf.modules.packed import PackedModule
from ciuic_kernels import BlockGrid, PackedTensor


def compressed_modules(model: nn.Module) -> Iterator[tuple[str, PackedModule]]:
    """``(name, module)`` of every compressed module."""
    for name, module in model.named_modules():
        if isinstance(module, PackedModule) and module.is_compressed:
            yield name, module


def swap_in(
    model: nn.Module, parameters: Iterable[tuple[str, tuple[int, ...], int]], dtype: torch.dtype
) -> None:
    """Replace modules by compressed ones with meta parameters of their exact packed sizes.

    Args:
        parameters: ``(full name, logical shape, arena bytes)`` of every parameter to compress.
        dtype: dtype of dense results.

    Raises:
        CiuicError: when a name or shape does not fit the model.
    """
    for full_name, shape, nbytes in parameters:
        module_name, _, parameter = full_name.rpartition(".")
        module = adopt_module(model, module_name, parameter, full_name, dtype)
        if tuple(module.packed_shapes.get(parameter, ())) != tuple(shape):
            raise CiuicError(
                f"{full_name} is {list(module.packed_shapes.get(parameter, ()))} in this model but {list(shape)} in "
                "the checkpoint's quantization_config; config.json belongs to another model."
            )
        tags_shape = BlockGrid(tuple(shape)).tags_shape
        module.set_packed(
            parameter,
            PackedTensor(
                tuple(shape),
                torch.empty(nbytes, dtype=torch.uint8, device="meta"),
                torch.empty(tags_shape, dtype=torch.uint8, device="meta"),
            ),
        )


def adopt_module(
    model: nn.Module, module_name: str, parameter: str, full_name: str, dtype: torch.dtype
) -> PackedModule:
    """The module of a parameter, made compressed if it is not yet. Raises CiuicError for one that cannot be."""
    try:
        module = model.get_submodule(module_name)
    except AttributeError:
        raise CiuicError(
            f"The checkpoint compresses {full_name}, which a {type(model).__name__} does not have; load it with the "
            "class it was saved from, or config.json belongs to another model."
        ) from None
    if isinstance(module, PackedModule):
        return module
    if isinstance(module, nn.Linear):
        return CiuicLinear.adopt(module, dtype)
    if isinstance(module, nn.Embedding):
        return CiuicEmbedding.adopt(module, dtype)
    if is_fused_experts(module):
        return adopt_experts(module, dtype)
    raise CiuicError(f"{full_name} belongs to a {type(module).__name__}, which Ciuic cannot compress.")


def restore_dense(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every compressed module by its original class with decoded weights; tied weights stay tied."""
    modules = [module for _, module in compressed_modules(model)]
    arenas = [getattr(module, next(iter(module.packed_shapes))) for module in modules]
    tied = {id(arena) for arena in arenas if sum(arena is other for other in arenas) > 1}
    dense: dict[int, Any] = {}
    for module, arena in zip(modules, arenas, strict=True):
        if id(arena) in dense:
            module.restore(dtype).weight = dense[id(arena)]
            continue
        restored = module.restore(dtype)
        if id(arena) in tied:
            dense[id(arena)] = restored.weight
