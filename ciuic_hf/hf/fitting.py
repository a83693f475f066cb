"""Whether the headers of a checkpoint fit the model that its config.json describes."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from ciuic_hf.checkpoint import TensorHeader
from ciuic_hf.errors import CiuicError
from ciuic_hf.hf.fp8 import SCALE_SUFFIX, Block
from ciuic_kernels.format import ceil_div

_NUMBER = re.compile(r"\d+")


def check_headers(
    model: Any, headers: Iterable[TensorHeader], block: Block | None, complete: bool = True
) -> None:
    """Raise CiuicError when a tensor is missing, or has a shape that the model does not expect.

    Tensors that the model has no place for are no error; DeepSeek-V3's multi-token-prediction layer is such.

    Args:
        model: on the meta device.
        block: of FP8 scales, None where the files are plain.
        complete: whether the headers are all there are; else nothing counts as missing.
    """
    by_name = {header.name: header for header in headers}
    weights = {name: h for name, h in by_name.items() if not name.endswith(SCALE_SUFFIX)}
    for name, header in by_name.items():
        if name not in weights and block is not None:
            _check_scales(by_name.get(name.removesuffix(SCALE_SUFFIX)), header, block)
    names = _Names(model)
    merged: dict[str, int] = defaultdict(int)
    seen = set()
    for name, header in weights.items():
        target, is_merged = names.target(name)
        expected = names.shapes.get(target)
        if expected is None:
            continue
        seen.add(target)
        merged[target] += math.prod(header.shape) if is_merged else math.prod(expected)
        if not is_merged and header.shape != expected:
            raise CiuicError(
                f"{header.file}: {name} is {list(header.shape)}, config.json makes it {list(expected)}; one of them "
                "belongs to another model."
            )
    if complete:
        _check_complete(model, names.shapes, merged, seen)


def _check_complete(
    model: Any, shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, int], seen: set[str]
) -> None:
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    shared = {name for pair in ties.items() for name in pair if seen & set(pair)}
    for name, shape in shapes.items():
        if name not in seen and name not in shared:
            raise CiuicError(
                f"No file holds {name} {list(shape)}, which config.json asks for; a file is missing or one of them "
                "belongs to another model."
            )
        if name in seen and weights[name] != math.prod(shape):
            raise CiuicError(
                f"{name} is {list(shape)} by config.json, {math.prod(shape):,} weights, and the files hold "
                f"{weights[name]:,} for it; a part is missing or config.json belongs to another model."
            )


def _check_scales(weight: TensorHeader | None, scale: TensorHeader, block: Block) -> None:
    if weight is None or len(weight.shape) != 2:
        return
    expected = tuple(ceil_div(size, step) for size, step in zip(weight.shape, block, strict=True))
    if scale.shape != expected:
        raise CiuicError(
            f"{scale.file}: {weight.name} is {list(weight.shape)} with {list(scale.shape)} scales, but blocks of "
            f"{list(block)} need {list(expected)}; config.json's weight_block_size or the file is wrong."
        )


class _Names:
    """The model's name for each name of a file, by transformers' own rules.

    Names that differ in numbers only go the same way; a rule is asked once for all of them, as V3 has 92,000.

    Attributes:
        shapes: of everything that files should hold, by the model's names.
    """

    def __init__(self, model: Any) -> None:
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._prefix = model.base_model_prefix
        rules = get_model_conversion_mapping(model)
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
        self._known: dict[str, tuple[str, list[int] | None, bool]] = {}

    def target(self, name: str) -> tuple[str, bool]:
        """The model's name, and whether a converter merges or splits the tensor on the way."""
        if name in self.shapes:
            return name, False
        general = _NUMBER.sub("#", name)
        if general not in self._known:
            self._known[general] = self._learn(name)
        pattern, places, is_merged = self._known[general]
        if places is None:
            renamed, source = self._rename(name)
            return renamed, source is not None
        numbers = _NUMBER.findall(name)
        return pattern.format(*(numbers[place] for place in places)), is_merged

    def _learn(self, name: str) -> tuple[str, list[int] | None, bool]:
        """A template with the places of its numbers in the name, or None for them when that is ambiguous."""
        renamed, source = self._rename(name)
        numbers, there = _NUMBER.findall(name), _NUMBER.findall(renamed)
        distinct = [str(10**6 + place) for place in range(len(numbers))]
        counter = iter(distinct)
        probe = _NUMBER.sub(lambda _: next(counter), name)
        probed, _ = self._rename(probe)
        found = _NUMBER.findall(probed)
        if len(found) != len(there) or not set(found) <= set(distinct) or "{" in renamed:
            return "", None, False
        return _NUMBER.sub("{}", renamed), [distinct.index(number) for number in found], source is not None

    def _rename(self, name: str) -> tuple[str, str | None]:
        renamed, source = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self.shapes
        )
        return renamed, source
