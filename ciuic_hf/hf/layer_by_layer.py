"""An uncompressed checkpoint of which one decoder layer at a time is in memory.

Weights are read by transformers' own loader and its rules for the model (names, merged experts), with the converters
of :mod:`ciuic_hf.hf.convert`, which here have nothing to encode and dequantize FP8.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from ciuic_hf.checkpoint import check_files, checkpoint_files
from ciuic_hf.errors import CiuicError
from ciuic_hf.hf.config import CiuicConfig
from ciuic_hf.hf.decoder_layers import decoder_layers
from ciuic_hf.hf.merge import merge_for_ciuic
from ciuic_hf.hf.quantizer import CiuicQuantizer
from ciuic_hf.hf.reporting import quietly


class StreamedModel:
    """A model whose layers are on the meta device, except inside :meth:`present`.

    Args:
        path: directory of a bf16, fp16, fp32 or FP8 checkpoint in safetensors files.
        dtype: to compute in, None for the checkpoint's own.
        device: to compute on.

    Attributes:
        model: in evaluation mode; everything outside its layers is in memory.

    Raises:
        CiuicError: for a checkpoint that is compressed or quantized in another way than FP8, or not whole.
    """

    def __init__(self, path: Path, dtype: torch.dtype | None, device: str) -> None:
        config = AutoConfig.from_pretrained(path)
        self._quantizer = passive_quantizer(config, path)
        self._dtype = dtype or config.dtype or torch.float32
        with init_empty_weights(include_buffers=False):
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=self._dtype).eval()
        self._device = device
        for buffer_name, buffer in self.model.named_buffers():
            owner = self.model.get_submodule(buffer_name.rpartition(".")[0])
            owner._buffers[buffer_name.rpartition(".")[2]] = buffer.to(device)
        self.model.requires_grad_(False)
        self._layers = tuple(decoder_layers(self.model))
        self._mapping = get_model_conversion_mapping(self.model, None, self._quantizer)
        self._dtype_plan = self._quantizer.read_as_stored(self.model, self._dtype)
        self._files = self._sort(path)
        self._load("")
        self.model.tie_weights()
        for name, parameter in self.model.named_parameters():
            if parameter.device.type == "meta" and self._owner(name) == "":
                raise CiuicError(f"{name} is missing from the files of {path}; download them again.")

    @contextmanager
    def present(self, name: str, layer: nn.Module) -> Iterator[None]:
        """Inside, the weights of a layer are there."""
        places = [
            (module, parameter, module._parameters[parameter])
            for module in layer.modules()
            for parameter in list(module._parameters)
        ]
        self._load(name)
        try:
            for parameter, weight in layer.named_parameters():
                weight.requires_grad_(False)
                if weight.device.type == "meta":
                    raise CiuicError(f"{name}.{parameter} is missing from the checkpoint; download it again.")
            yield
        finally:
            for module, parameter, placeholder in places:
                module._parameters[parameter] = placeholder

    def _owner(self, name: str) -> str:
        """The layer that a parameter is in, or ``""``."""
        return next((layer for layer in self._layers if name.startswith(f"{layer}.")), "")

    def _sort(self, path: Path) -> dict[str, dict[str, Path]]:
        """Layer, or ``""``, -> the tensors of the files that its parameters are made of -> the file."""
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        known = self.model.state_dict()
        found: dict[str, dict[str, Path]] = defaultdict(dict)
        for header in check_files(checkpoint_files(path)):
            target, _ = rename_source_key(
                header.name, renamings, converters, self.model.base_model_prefix, known
            )
            found[self._owner(target)][header.name] = header.file
        return found

    def _load(self, name: str) -> None:
        """Read what belongs to a layer, or to none."""
        options = LoadStateDictConfig(
            dtype=self._dtype,
            dtype_plan=self._dtype_plan,
            hf_quantizer=self._quantizer,
            weight_mapping=self._mapping,
            device_map={"": self._device},
        )
        with ExitStack() as files, quietly():
            opened = {
                file: files.enter_context(safe_open(file, framework="pt"))
                for file in set(self._files[name].values())
            }
            tensors = {key: opened[file].get_slice(key) for key, file in self._files[name].items()}
            convert_and_load_state_dict_in_model(self.model, tensors, options)


def passive_quantizer(config: Any, path: Path) -> CiuicQuantizer:
    """What the converters ask for dtypes; takes the checkpoint's own quantization out of the config.

    Raises:
        CiuicError: for a checkpoint that is compressed, or quantized in another way than FP8.
    """
    wanted = CiuicConfig(bits=16)
    source = getattr(config, "quantization_config", None)
    if source is not None:
        merged = merge_for_ciuic(source, wanted)
        if merged is None:
            raise CiuicError(f"{path} is compressed by Ciuic already; calibrate the original model.")
        wanted = merged
        del config.quantization_config
    return CiuicQuantizer(wanted, pre_quantized=False)
