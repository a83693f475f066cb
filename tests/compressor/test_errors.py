"""Bad tensors, settings and files: one sentence each."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from ciuic_hf.compressor.compressed import CompressedTensor
from ciuic_hf.compressor.compressor import CiuicCompressor
from ciuic_hf.errors import CiuicError

BAD: dict[str, tuple[Any, str]] = {
    "nan": (torch.tensor([1.0, float("nan")]), "NaN or infinity"),
    "infinity": (np.array([[1.0, -np.inf]]), "NaN or infinity"),
    "a large float64": (torch.tensor([1e300], dtype=torch.float64), "outside of float32"),
    "a small float64": (np.full((3, 3), 1e-200), "outside of float32"),
    "meta": (torch.empty(3, device="meta"), "meta tensor"),
    "a sparse layout": (torch.eye(3).to_sparse(), "make it dense"),
    "a list": ([1.0], "got list"),
    "strings": (np.array(["a"]), "<U1"),
    "another byte order": (np.zeros(3, dtype=">f4"), ">f4"),
    "a mask": (np.ma.masked_array(np.zeros(3)), "MaskedArray"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors(case: str) -> None:
    value, says = BAD[case]
    with pytest.raises(CiuicError, match=says):
        CiuicCompressor().compress_tensor(value)


@pytest.mark.parametrize("ratio", [0, -1, 1.01, float("nan"), True, "half", None])
def test_bad_ratio(ratio: Any) -> None:
    with pytest.raises(CiuicError, match="compression_ratio"):
        CiuicCompressor(ratio)


@pytest.mark.parametrize("threshold", [-0.1, 1, float("nan"), True, "0"])
def test_bad_threshold(threshold: Any) -> None:
    with pytest.raises(CiuicError, match="sparse_threshold"):
        CiuicCompressor(0.5, threshold)


@pytest.mark.parametrize("bits", [1, 7, 9, 4.5, True, "4"])
def test_bad_bits(bits: Any) -> None:
    with pytest.raises(CiuicError, match="2, 3, 4, 5, 6, 8 bits"):
        CiuicCompressor().compress_quant(torch.ones(300), bits)


def change_header(state: dict[str, torch.Tensor], **changes: Any) -> dict[str, torch.Tensor]:
    header = json.loads(bytes(state["header"].tolist())) | changes
    return state | {"header": torch.tensor(list(json.dumps(header).encode()), dtype=torch.uint8)}


DAMAGE: dict[str, Any] = {
    "no header": lambda s: {n: t for n, t in s.items() if n != "header"},
    "header is noise": lambda s: s | {"header": torch.arange(9, dtype=torch.uint8)},
    "no tags": lambda s: {n: t for n, t in s.items() if n != "tags"},
    "one too many": lambda s: s | {"raw": torch.zeros(3, dtype=torch.uint8)},
    "short arena": lambda s: s | {"arena": s["arena"][:-16]},
    "unknown codec": lambda s: s | {"tags": torch.full_like(s["tags"], 255)},
    "infinite scale": lambda s: s | {"tags": s["tags"] | torch.tensor([0, 255], dtype=torch.uint8)},
    "later version": lambda s: change_header(s, format_version=99),
    "another shape": lambda s: change_header(s, shape=[70, 201]),
    "a negative shape": lambda s: change_header(s, shape=[-70, 200]),
    "another matrix": lambda s: change_header(s, matrix=[70, 400]),
    "a matrix of words": lambda s: change_header(s, matrix=["a", "b"]),
    "an integer dtype": lambda s: change_header(s, dtype="int8"),
    "no dtype": lambda s: change_header(s, dtype="Tensor"),
    "an infinite mean": lambda s: change_header(s, mean=float("inf")),
    "another kind": lambda s: change_header(s, kind="jax"),
    "raw without bytes": lambda s: change_header({"header": s["header"]}, matrix=None),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_state(damage: str) -> None:
    state = CiuicCompressor().compress_tensor(torch.randn(70, 200).half()).state_dict()
    with pytest.raises(CiuicError):
        CompressedTensor.from_state_dict(DAMAGE[damage](state))


def test_damaged_files(tmp_path: Any) -> None:
    path = tmp_path / "t.safetensors"
    CiuicCompressor().compress_tensor(torch.randn(70, 200)).save(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CiuicError, match="not a whole safetensors file"):
        CompressedTensor.load(path)
