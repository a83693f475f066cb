"""What config.json says of a compressed checkpoint, checked against its files and fitted to the class that loads it."""

from __future__ import annotations

from typing import Any

from ciuic_hf.checkpoint import TensorHeader, is_shape
from ciuic_hf.errors import CiuicError
from ciuic_hf.hf.config import CiuicConfig
from ciuic_hf.modules.packed import TAGS
from ciuic_kernels import BlockGrid


def fit_names(model: Any, by_name: dict[str, Any]) -> dict[str, Any]:
    """Parameter names as this class has them: a base model has no head and no prefix, a model with a head has both."""
    modules, prefix = {name for name, _ in model.named_modules()}, f"{model.base_model_prefix}."
    is_base = not hasattr(model, model.base_model_prefix)
    fitted = {}
    for name, entry in by_name.items():
        module = name.rpartition(".")[0]
        if module not in modules and is_base:
            if not name.startswith(prefix):
                continue  # of a head
            name = name.removeprefix(prefix)
        elif module not in modules and prefix + module in modules:
            name = prefix + name
        fitted[name] = entry
    ties: dict[str, str] = model.all_tied_weights_keys
    return {name: fitted[source] for name, source in ties.items() if source in fitted} | fitted


def check_sizes(config: CiuicConfig, headers: list[TensorHeader]) -> None:
    """Compare what config.json says of a compressed checkpoint with what its files hold. Raises CiuicError."""
    if not config.is_compressed:
        raise CiuicError(
            "config.json says quant_method ciuic but lists no compressed parameters; it was not saved by ciuic_hf."
        )
    by_name = {header.name: header for header in headers}
    for name, entry in config.parameters.items():
        shape: Any = entry.get("shape")
        nbytes = entry.get("arena_nbytes")
        if not is_shape(shape) or not isinstance(nbytes, int) or nbytes < 0:
            raise CiuicError(f"config.json describes {name} as {entry!r}; it needs a shape and arena_nbytes.")
        header = by_name.get(name)
        if header is not None and (header.dtype != "U8" or header.shape != (nbytes,)):
            raise CiuicError(
                f"{header.file.name}: {name} is {header.dtype} {list(header.shape)} but config.json says an arena of "
                f"{nbytes} bytes; the files belong to different checkpoints."
            )
        tags = by_name.get(name + TAGS)
        if tags is not None and (tags.dtype != "U8" or tags.shape != BlockGrid(tuple(shape)).tags_shape):
            raise CiuicError(
                f"{tags.file.name}: {name}{TAGS} is {tags.dtype} {list(tags.shape)}, a parameter {shape} needs U8 "
                f"{list(BlockGrid(tuple(shape)).tags_shape)}; the files belong to different checkpoints."
            )
