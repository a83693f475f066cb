"""``plan.json``: the codec of every block of a model, what that takes, and where the bytes go."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ciuic_hf.errors import CiuicError
from ciuic_kernels import BlockGrid, all_codecs

PLAN_VERSION = 1


def fingerprint(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """A short hash of the names and shapes of the compressed parameters."""
    lines = "\n".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ModelPlan:
    """A plan for a model.

    Attributes:
        shapes: parameter name -> ``(N, K)`` or ``(E, N, K)``.
        codecs: parameter name -> uint8 ``[strips, kblocks]``, the same for every expert, or ``[E, strips, kblocks]``.
        nbytes: arenas and tags of all parameters, tied ones once.
        error: predicted KL in nats per token, None unless sensitivities were measured.
        budget: purpose -> bytes, for whoever reads the file.
        settings: what was asked for, likewise.
    """

    shapes: Mapping[str, tuple[int, ...]]
    codecs: Mapping[str, Tensor]
    nbytes: int
    error: float | None
    budget: Mapping[str, int]
    settings: Mapping[str, Any]

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CiuicError unless the plan is for a model whose weights to compress have these shapes."""
        for name in sorted({*shapes, *self.shapes}):
            if self.shapes.get(name) != shapes.get(name):
                here, there = (list(s[name]) if name in s else "nothing" for s in (shapes, self.shapes))
                raise CiuicError(
                    f"The plan is for another model or other settings of modules: {name} is {here} to compress in this "
                    f"model and {there} in the plan; make one with `ciuic plan MODEL --save FILE`."
                )

    def save(self, path: Path) -> None:
        """Write JSON: sizes and settings to read, codecs as zlib-compressed bytes in base64."""
        document = {
            "version": PLAN_VERSION,
            "model": fingerprint(self.shapes),
            "settings": dict(self.settings),
            "nbytes": self.nbytes,
            "predicted_kl": self.error,
            "budget": dict(self.budget),
            "parameters": {
                name: {
                    "shape": list(shape),
                    "experts_differ": self.codecs[name].dim() == 3,
                    "codecs": _pack(self.codecs[name]),
                }
                for name, shape in self.shapes.items()
            },
        }
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ModelPlan:
        """Read a plan. Raises CiuicError for a file that is none, of a later version, or damaged."""
        path = Path(path)
        if not path.is_file():
            raise CiuicError(f"There is no plan {path}; `ciuic plan MODEL --save {path}` makes one.")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            version = document["version"]
        except (ValueError, KeyError, TypeError):
            raise CiuicError(f"{path} is not a plan; `ciuic plan MODEL --save FILE` makes one.") from None
        if version != PLAN_VERSION:
            raise CiuicError(
                f"{path} is a plan of version {version}, this ciuic_hf follows version {PLAN_VERSION}; make it again."
            )
        try:
            shapes = {name: tuple(entry["shape"]) for name, entry in document["parameters"].items()}
            codecs = {name: _unpack(entry) for name, entry in document["parameters"].items()}
            intact = document["model"] == fingerprint(shapes)
            plan = cls(
                shapes,
                codecs,
                document["nbytes"],
                document["predicted_kl"],
                document["budget"],
                document["settings"],
            )
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, zlib.error):
            intact = False
        if not intact:
            raise CiuicError(f"{path} is a damaged plan; make it again.")
        return plan


def _pack(codecs: Tensor) -> str:
    return base64.b64encode(zlib.compress(codecs.contiguous().numpy().tobytes(), 6)).decode("ascii")


def _unpack(entry: Mapping[str, Any]) -> Tensor:
    grid = BlockGrid(tuple(entry["shape"]))
    raw = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(entry["codecs"]))), dtype=torch.uint8)
    codecs = raw.view(grid.tags_shape[:-1] if entry["experts_differ"] else (grid.strips, grid.kblocks))
    if not {codec.id for codec in all_codecs()} >= set(codecs.unique().tolist()):
        raise ValueError("unknown codec")
    return codecs
