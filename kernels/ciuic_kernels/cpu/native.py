"""Builds ``blocks.c`` with the system's C compiler and exposes its functions on tensors.

Triton needs a C compiler at run time too, so a machine that can use the GPU kernels can use these. Without one
the torch reference does the same work more slowly, and :func:`unavailable_reason` says why. The shared object is
kept in the user's cache, named by a hash of source, compiler, flags and processor, so it is built once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache, lru_cache
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from ciuic_kernels.codec import all_codecs, codec_count
from ciuic_kernels.codecs.grid import GRIDS, LINEAR, PLANES, SCALE_OFFSETS, levels, thresholds
from ciuic_kernels.codecs.raw16 import RAW_BF16, RAW_FP16
from ciuic_kernels.codecs.sparse import SPARSE
from ciuic_kernels.codecs.zero import ZERO

FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
PROCESSOR_FLAGS = ("-march=native", "-mcpu=native", "")  # the first that the compiler takes
OPENMP_FLAGS = ("-fopenmp", "")  # Apple's clang has none: the same code then runs on one thread
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# What blocks.c has code for.
CODECS = {ZERO.id, RAW_BF16.id, RAW_FP16.id}
CODECS |= {grid.id for grid in GRIDS.values()} | {sparse.id for sparse in SPARSE.values()}
DIRECT = (torch.float32, torch.bfloat16)  # what the kernels read and write; float16 goes through float32
MAX_TOKENS = 16  # rows of x that one pass over a matrix serves


class _Grid(ctypes.Structure):
    _fields_ = (
        ("levels", ctypes.c_float * 256),
        ("inverse", ctypes.c_float * 8),
        ("first", ctypes.c_float),
        ("last", ctypes.c_float),
        ("linear", ctypes.c_float),
        ("offsets", ctypes.c_int32 * 8),
        ("offset_count", ctypes.c_int32),
    )


def _inverse(bits: int) -> list[float]:
    """Coefficients of y, y^3, ... (``bits`` of them) that take threshold i to ``i + 1/2 - 2^(bits - 1)``.

    The encoder's first guess of a code. It compares with one true threshold afterwards, so the codes are exact as
    long as the polynomial is less than 1/2 off at the thresholds; the widths of the format stay below 1/8.
    """
    bounds = thresholds(bits).double()
    targets = torch.arange(len(bounds), dtype=torch.float64, device="cpu") + 0.5 - 2 ** (bits - 1)
    powers = bounds[:, None] ** torch.arange(1, 2 * bits, 2, device="cpu")
    solution = torch.linalg.lstsq(powers, targets).solution
    assert float((powers @ solution - targets).abs().max()) < 0.4
    return solution.tolist()


def _grid_tables() -> ctypes.Array[_Grid]:
    """``struct grid[9]`` indexed by width, filled from codecs/grid.py."""
    tables = (_Grid * 9)()
    for bits in PLANES:
        table, bounds = tables[bits], thresholds(bits)
        table.levels[:] = levels(bits).tolist() * (256 >> bits)
        table.inverse[:bits] = _inverse(bits)
        table.first, table.last = float(bounds[0]), float(bounds[-1])
        offsets = SCALE_OFFSETS[bits]
        table.offsets[: len(offsets)] = offsets
        table.offset_count = len(offsets)
        table.linear = LINEAR[bits]
    return tables


def _compiler() -> str | None:
    named = os.environ.get("CC")
    return (
        shutil.which(named) if named else next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    )


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ciuic"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        return "".join(sorted({x for x in lines if x.startswith(("flags", "Features", "model name"))}))
    return platform.processor()


def _build(compiler: str, name: str) -> Path:
    """Path of the shared object, built if the cache does not have it. Raises RuntimeError with the compiler's words."""
    source = Path(__file__).with_name(name)
    headers = [path.read_text() for path in sorted(source.parent.glob("*.h"))]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    identity = "\0".join(
        (source.read_text(), *headers, version, *FLAGS, *PROCESSOR_FLAGS, platform.machine(), _processor())
    )
    target = _cache_dir() / f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch) / target.name
        command = [compiler, *FLAGS, "-shared", "-fPIC", "-o", str(built), str(source), "-lm"]
        for variant in product(PROCESSOR_FLAGS, OPENMP_FLAGS):
            flags = [flag for flag in variant if flag]
            result = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
            if result.returncode == 0:
                built.replace(target)
                return target
    raise RuntimeError(f"{compiler} could not build the CPU kernels: {result.stderr.strip()[:400]}")


def build_library(name: str) -> tuple[ctypes.CDLL | None, str]:
    """The library of a source file of this folder, built at need; or why there is none."""
    compiler = _compiler()
    if compiler is None:
        return None, "no C compiler was found (install gcc or clang, or set CC)"
    try:
        return ctypes.CDLL(str(_build(compiler, name))), ""
    except (OSError, RuntimeError) as error:
        return None, str(error)


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    library, reason = build_library("blocks.c")
    if library is None:
        return None, reason
    p, n, i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.ciuic_encode.argtypes = (p, i, n, n, n, p, p, p, p)
    library.ciuic_dequantize.argtypes = (p, p, p, n, n, n, n, p, i, p)
    library.ciuic_gather.argtypes = (p, p, p, n, n, p, n, p, i, p)
    library.ciuic_products.argtypes = (p, p, p, n, n, p, p, i, n, n, p, p, p, n, p)
    library.ciuic_fp8_rows.argtypes = (p, n, n, n, p, p, n, n, p)
    for name in ("ciuic_dequantize", "ciuic_gather", "ciuic_fp8_rows"):
        getattr(library, name).restype = None
    return library, ""


def unavailable_reason() -> str:
    """Why the compiled kernels cannot be used, or an empty string."""
    if codec_count() > len(CODECS):  # a codec may be registered at any time
        foreign = next(codec.name for codec in all_codecs() if codec.id not in CODECS)
        return f"blocks.c has no code for the codec {foreign}"
    return _load()[1]


def available() -> bool:
    return not unavailable_reason()


def _library() -> ctypes.CDLL:
    library = _load()[0]
    if library is None or not available():
        raise RuntimeError(f"The compiled CPU kernels are not available: {unavailable_reason()}.")
    return library


@lru_cache(maxsize=1)
def tables() -> ctypes.Array[_Grid]:
    """``struct grid[9]`` of blocks.h, by width."""
    return _grid_tables()


def encode(source: Tensor, tags: Tensor, offsets: Tensor, arena: Tensor) -> bool:
    """Encode one matrix into its arena; False when a weight is not finite.

    Args:
        source: ``[N, K]`` float32, bfloat16 or float16, last dimension contiguous.
        tags: uint8 ``[strips, kblocks, 2]`` with the codec ids; the exponents are written.
        offsets: int64 ``[strips (+ 1)]``, byte offset of each strip in ``arena``.
        arena: uint8, contiguous; padding bytes are zeroed.
    """
    status: int = _library().ciuic_encode(
        source.data_ptr(), DTYPES[source.dtype], source.stride(0), *source.shape,
        tags.data_ptr(), offsets.data_ptr(), tables(), arena.data_ptr(),
    )  # fmt: skip
    return status == 0


@cache
def _fp8_values(dtype: torch.dtype) -> Tensor:
    """float32 ``[256]``: what each byte of an 8-bit float stands for."""
    return torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).to(torch.float32)


def fp8_rows(weight: Tensor, scales: Tensor, block: tuple[int, int], first: int, last: int) -> Tensor:
    """Rows ``[first, last)`` of a block-scaled 8-bit float matrix ``[N, K]``, contiguous, as float32.

    Args:
        scales: float32 ``[ceil(N / block[0]), ceil(K / block[1])]``, contiguous.
    """
    out = torch.empty(last - first, weight.shape[1], dtype=torch.float32)
    _library().ciuic_fp8_rows(
        weight.data_ptr(), weight.shape[1], first, last, _fp8_values(weight.dtype).data_ptr(),
        scales.data_ptr(), *block, out.data_ptr(),
    )  # fmt: skip
    return out


def dequantize(
    arena: Tensor, tags: Tensor, offsets: Tensor, rows: int, cols: int, strips: range, out: Tensor
) -> None:
    """Decode the strips of one matrix into ``out`` float32 or bfloat16 ``[rows of the strips, cols]``."""
    _library().ciuic_dequantize(
        arena.data_ptr(), tags.data_ptr(), offsets.data_ptr(), rows, cols, strips.start, strips.stop,
        tables(), DTYPES[out.dtype], out.data_ptr(),
    )  # fmt: skip


def gather(
    arena: Tensor, tags: Tensor, offsets: Tensor, rows: int, cols: int, ids: Tensor, dtype: torch.dtype
) -> Tensor:
    """Rows ``ids`` int64 ``[T]`` (all inside ``rows``) of one matrix as ``[T, cols]`` of ``dtype``."""
    out = torch.empty(ids.numel(), cols, dtype=dtype if dtype in DIRECT else torch.float32)
    _library().ciuic_gather(
        arena.data_ptr(), tags.data_ptr(), offsets.data_ptr(), rows, cols,
        ids.data_ptr(), ids.numel(), tables(), DTYPES[out.dtype], out.data_ptr(),
    )  # fmt: skip
    return out.to(dtype)


@lru_cache(maxsize=64)
def groups_of_all(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(order, starts, experts)`` for ``count`` rows of a single matrix."""
    starts = [*range(0, count, MAX_TOKENS), count]
    return torch.arange(count), torch.tensor(starts), torch.zeros(len(starts) - 1, dtype=torch.int64)


def products(
    x: Tensor,
    fan: int,
    groups: tuple[Tensor, Tensor, Tensor],
    arena: Tensor,
    tags: Tensor,
    offsets: Tensor,
    rows: int,
) -> Tensor:
    """Grouped matrix-vector products; see ``ciuic_products`` in blocks.c.

    Args:
        x: float32 or bfloat16 ``[T, K]``, contiguous.
        fan: outputs for each row of ``x``: output row r reads ``x[r // fan]``.
        groups: ``order`` int64 ``[*]``, output rows by group, ``starts`` int64 ``[G + 1]`` (at most
            ``MAX_TOKENS`` apart) and
            ``experts`` int64 ``[G]``.

    Returns:
        ``[T * fan, rows]`` of x's dtype; rows that are in no group are not written.
    """
    order, starts, experts = groups
    out = torch.empty(x.shape[0] * fan, rows, dtype=x.dtype)
    failed = _library().ciuic_products(
        arena.data_ptr(), tags.data_ptr(), offsets.data_ptr(), rows, x.shape[1], tables(),
        x.data_ptr(), DTYPES[x.dtype], x.shape[0], fan,
        order.data_ptr(), starts.data_ptr(), experts.data_ptr(), experts.numel(), out.data_ptr(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"No memory for {x.shape[0]} x {x.shape[1]} inputs in float32.")
    return out
