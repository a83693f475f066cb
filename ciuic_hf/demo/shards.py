"""Writes tensors one after another into sharded safetensors files, holding one shard in memory at a time."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

INDEX_NAME = "model.safetensors.index.json"


class ShardWriter:
    """Collects tensors until a shard is full, as transformers names them: model-00001-of-00004.safetensors.

    The number of shards is known only at the end, so the files get their final names in `close`. A single
    shard is called model.safetensors and has no index.
    """

    def __init__(self, out_dir: Path, max_shard_size: int) -> None:
        self.out_dir = out_dir
        self.max_shard_size = max_shard_size
        self.total_size = 0
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_size = 0
        self._shards: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Adds one tensor, first writing the shard it would not fit into any more."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_size + size > self.max_shard_size:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_size += size
        self.total_size += size

    def _flush(self) -> None:
        path = self.out_dir / f"part-{len(self._shards) + 1:05d}.safetensors"
        save_file(self._pending, path, metadata={"format": "pt"})
        self._shards.append((path, list(self._pending)))
        self._pending = {}
        self._pending_size = 0

    def close(self) -> list[Path]:
        """Writes what is left and the index; returns the shards' paths."""
        if self._pending:
            self._flush()
        if len(self._shards) == 1:
            path = self.out_dir / "model.safetensors"
            self._shards[0][0].replace(path)
            return [path]
        paths: list[Path] = []
        weight_map: dict[str, str] = {}
        for number, (part, names) in enumerate(self._shards, start=1):
            path = self.out_dir / f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            part.replace(path)
            paths.append(path)
            weight_map |= dict.fromkeys(names, path.name)
        index = {"metadata": {"total_size": self.total_size}, "weight_map": dict(sorted(weight_map.items()))}
        (self.out_dir / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return paths
