"""Looking for pruned weights in the files of a checkpoint, before codecs are chosen.

A few rows of some tensors say whether a model was pruned at all. If it was, all weights are read once more than a load
reads them, through the same converters, to count what is not zero in every block.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import SkipParameters, convert_and_load_state_dict_in_model
from transformers.utils import logging

from ciuic_hf.checkpoint import TensorHeader
from ciuic_hf.compressor.blocks import any_pruned, measure_blocks
from ciuic_hf.hf import fp8
from ciuic_hf.hf.convert import streaming_conversions
from ciuic_hf.hf.destination import Destination
from ciuic_hf.hf.encoder import Part, check_shape
from ciuic_hf.modules.targets import Target
from ciuic_kernels import BlockGrid

SAMPLED_TENSORS, SAMPLED_ROWS = 512, 2
PRUNED_FROM = 0.25  # zeros in the sample of a tensor; at 3/8 sparse blocks begin
_FLOATS = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

logger = logging.get_logger(__name__)


def looks_pruned(headers: Sequence[TensorHeader]) -> bool:
    """Whether any of the tensors sampled, evenly over the files, has many zeros in its middle rows."""
    matrices = [h for h in headers if len(h.shape) >= 2 and h.dtype in _FLOATS and min(h.shape) > 0]
    step = max(1, len(matrices) // SAMPLED_TENSORS)
    with ExitStack() as files:
        opened: dict[Path, Any] = {}
        for header in matrices[::step]:
            if header.file not in opened:
                opened[header.file] = files.enter_context(safe_open(header.file, framework="pt"))
            first = header.shape[0] // 2
            rows = opened[header.file].get_slice(header.name)[first : first + SAMPLED_ROWS]
            if int(rows.float().count_nonzero()) <= (1 - PRUNED_FROM) * rows.numel():
                return True
    return False


def survey(
    model: Any,
    headers: Sequence[TensorHeader],
    block: fp8.Block | None,
    targets: Sequence[Target],
    thorough: bool,
) -> dict[str, Tensor]:
    """A ``Survey`` of files.

    Args:
        model: on the meta device, as it will be loaded.
        headers: all tensors of the files.
        block: FP8 block size, None when the checkpoint is not FP8.
    """
    worthwhile = bool(targets) and (thorough or looks_pruned(headers))
    return _count(model, headers, block, targets) if worthwhile else {}


def _count(
    model: Any, headers: Sequence[TensorHeader], block: fp8.Block | None, targets: Sequence[Target]
) -> dict[str, Tensor]:
    from transformers.modeling_utils import LoadStateDictConfig  # late: it imports Triton

    logger.info("Reading the weights once before they are loaded, to count their zeros.")
    counter = _Counter(targets)
    experts = {t.parameter for t in targets if len(t.shape) == 3}
    load = LoadStateDictConfig(
        hf_quantizer=counter,
        device_map={"": "cpu"},
        weight_mapping=streaming_conversions(get_model_conversion_mapping(model), experts, block),
    )
    conversions = getattr(model, "_weight_conversions", None)
    with ExitStack() as files:
        files.callback(setattr, model, "_weight_conversions", conversions)
        slices: dict[str, Any] = {}
        for file in dict.fromkeys(h.file for h in headers):
            opened = files.enter_context(safe_open(file, framework="pt"))
            slices |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        convert_and_load_state_dict_in_model(model, slices, load)
    for tied in getattr(model, "all_tied_weights_keys", {}).items():
        for name, other in (tied, tied[::-1]):
            if other in counter.counts:  # files hold one of the two
                counter.counts.setdefault(name, counter.counts[other])
    return counter.pruned()


class _Counter:
    """Stands where transformers expects a quantizer, and counts where that would encode."""

    pre_quantized = False  # weights are read one by one then

    def __init__(self, targets: Sequence[Target]) -> None:
        self.destination = Destination()
        self._grids = {t.name: BlockGrid(t.shape) for t in targets}
        self.counts: dict[str, Tensor] = {}

    def param_needs_quantization(self, _model: Any, _name: str) -> bool:
        return False

    def encoder(self, _model: Any, name: str) -> _Counts:
        if name not in self._grids:
            raise SkipParameters
        return _Counts(self, name, self._grids[name])

    def pruned(self) -> dict[str, Tensor]:
        return {n: counts for n, counts in self.counts.items() if any_pruned(counts, self._grids[n])}


class _Counts:
    """An :class:`~ciuic_hf.hf.encoder.Encoder` that counts the weights of one parameter."""

    def __init__(self, counter: _Counter, name: str, grid: BlockGrid) -> None:
        self._counter, self._name, self.grid = counter, name, grid
        self._counts = torch.zeros(grid.tags_shape[:-1], dtype=torch.int32)

    def add(self, index: int, parts: list[Part]) -> None:
        check_shape(self._name, self.grid, parts)
        counts = self._counts.view(self.grid.matrices, self.grid.strips, self.grid.kblocks)
        counts[index] = torch.cat([measure_blocks(weight).nonzeros for weight, _ in parts]).to(torch.int32)

    def finish(self) -> dict[str, Tensor]:
        self._counter.counts[self._name] = self._counts
        return {}
