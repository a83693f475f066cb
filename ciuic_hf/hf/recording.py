"""What ``save_pretrained`` would write of a model on the meta device, by letting it and taking the tensors away."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ciuic_hf.shards import Slot, lay_out


@dataclass
class Recording:
    """Where every tensor belongs.

    Attributes:
        headers: file name -> its safetensors header.
        slots: name in the files -> place.
        stored_names: parameter name -> its name in the files, which a model can spell otherwise; tied parameters share
            one.
        real_names: of ``slots``, those that are not on the meta device.
    """

    headers: dict[str, bytes] = field(default_factory=dict)
    slots: dict[str, Slot] = field(default_factory=dict)
    stored_names: dict[str, str] = field(default_factory=dict)
    real_names: set[str] = field(default_factory=set)


def record_save(model: Any, directory: Path, max_shard_size: int | str) -> Recording:
    """Save a model without its weights: config, index and whatever else belongs to them are written."""
    from transformers import PreTrainedModel

    recording = Recording()
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in model.state_dict(keep_vars=True).items():
        names[_storage(tensor)].append(name)

    def record(file: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        header, slots = lay_out(file, tensors, metadata)
        recording.headers[file] = header
        recording.slots |= slots
        for stored, tensor in tensors.items():
            recording.stored_names |= dict.fromkeys(names[_storage(tensor)], stored)
            if tensor.device.type != "meta":
                recording.real_names.add(stored)

    original = PreTrainedModel.save_pretrained.__wrapped__
    with _shards_recorded(directory, record):
        original(model, directory, max_shard_size=max_shard_size)
    return recording


def _storage(tensor: Tensor) -> int:
    """The identity of a tensor's storage, which ``state_dict`` keeps; also on the meta device."""
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def _shards_recorded(directory: Path, record: Any) -> Iterator[None]:
    """Hand shards that this thread saves to ``directory`` to ``record`` instead of writing them."""
    from transformers import modeling_utils

    original, thread = modeling_utils.safe_save_file, threading.get_ident()

    def save_file(tensors: dict[str, Tensor], filename: str, metadata: dict[str, str] | None = None) -> None:
        if threading.get_ident() == thread and Path(filename).parent == directory:
            record(Path(filename).name, tensors, metadata or {})
        else:
            original(tensors, filename, metadata=metadata)

    modeling_utils.safe_save_file = save_file
    try:
        yield
    finally:
        modeling_utils.safe_save_file = original
