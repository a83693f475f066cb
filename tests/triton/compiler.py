"""Compiles cases to machine code and measures it: the process that the gate starts, because Triton must not interpret.

    python -m tests.triton.compiler < cases.jsonl > measurements.jsonl

One JSON object a line, measurements in the order of the cases. Which Triton is used is the importer's choice
(PYTHONPATH); machine code is read with the tools that its wheel ships.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from ciuic_hf.planning.cache_formats import CHUNK, cache_formats
from ciuic_kernels.attention import LATENT_TILES, largest_tile
from ciuic_kernels.work import ANY, ANY_SPARSE
from tests.triton.cases import Case
from tests.triton.measurement import Measurement
from tests.triton.pages import LATENTS
from tests.triton.sass import accesses, instructions, loops

POINTERS = {
    "arena": "u8", "work": "i32", "order": "i32", "tiles": "i32", "ids": "i64", "workspace": "fp32",
    "addresses": "i64", "pages": "i32", "count": "i32", "mask": "u8", "lse": "fp32",
}  # fmt: skip
OF_DTYPE = ("x", "bias", "out", "query", "query_rope")


def kernel_of(name: str):
    """The ``@triton.jit`` function of a case's kernel."""
    from ciuic_kernels.triton import attention, dequantize, embedding, experts, linear, linears

    return {
        "linear": linear.linear_kernel,
        "linears": linears.linears_kernel,
        "experts_few": experts.few_kernel,
        "experts_many": experts.many_kernel,
        "dequantize": dequantize.dequantize_kernel,
        "embedding": embedding.embedding_kernel,
        "attend_heads": attention.heads_kernel,
        "attend_latents": attention.latents_kernel,
    }[name]


def attention_values(case: Case) -> dict[str, object]:
    """Constants of attention to heads of 128, or to latents of 512 + 64."""
    latent = case.kernel == "attend_latents"
    formats = LATENTS[case.kinds[0]] if latent else cache_formats(case.kinds[0], False)
    keys, values = (512, 64) if latent else (128, 128)
    tiles = {queries: tokens for queries, tokens, _, _ in LATENT_TILES}
    tile = tiles[case.block_m] if latent else largest_tile(formats.keys.group)
    return {
        "KEY_BITS": formats.keys.bits, "KEY_GROUP": formats.keys.group, "VALUE_BITS": formats.values.bits,
        "VALUE_GROUP": formats.values.group, "KEY_WIDTH": keys, "VALUE_WIDTH": values, "D": keys, "E": values,
        "M": case.block_m, "T": tile, "TILES": CHUNK // tile, "HAS_MASK": case.masked,
    }  # fmt: skip


def compile_case(case: Case):
    """What a launch without bias compiles to: pointers on 16 bytes, N and K multiples of 16 if ``case.aligned``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernel_of(case.kernel)
    values = {
        "HAS_BIAS": False, "BIASED": 0, "KINDS": case.kinds, "BM": case.block_m, "STAGES": case.launch[2],
        "PAIRS": case.pairs, "HAS_ANY": bool({ANY, ANY_SPARSE} & set(case.kinds)),
        "HAS_SPARSE": ANY_SPARSE in case.kinds, "PLAIN": False,
    }  # fmt: skip
    if case.is_attention:
        values |= attention_values(case)
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        what = re.sub("_[abc]$", "", name) if case.kernel == "linears" else name  # one of several matrices
        if parameter.is_constexpr or what == "bias" or (name == "mask" and not case.masked):
            signature[name], constants[(place,)] = "constexpr", values.get(name)
            continue
        pointer = case.dtype if what in OF_DTYPE else POINTERS.get(what)
        if name == "out" and case.kernel == "experts_many" and len(case.kinds) > 1:
            pointer = "fp32"  # kinds add to it one after another
        if name == "out" and case.is_attention:
            pointer = "fp32"
        scalar = "fp32" if name == "scale" else "i32"
        signature[name] = f"*{pointer}" if pointer else scalar
        if pointer or (name in ("n", "k") and case.aligned):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.launch[2]}
    return triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)


def tool(name: str) -> str:
    """A program of the CUDA toolkit inside Triton's wheel."""
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__path__[0]) / "bin" / name)


def output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def serialised(ptx: str, arch: int) -> list[str]:
    """What ptxas says about asynchronous matrix instructions that it had to make wait (C7510 to C7515)."""
    if "wgmma" not in ptx:
        return []
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        program = tool("ptxas-blackwell" if arch >= 100 else "ptxas")
        said = output_of(program, "-v", f"--gpu-name={target[1]}", str(source), "-o", str(result))
    return sorted(set(re.findall(r"\(C75\d\d\)", said)))


def measure(case: Case) -> Measurement:
    """Compile a case and read what came out."""
    start = time.perf_counter()
    try:
        compiled = compile_case(case)
    except Exception as error:  # any failure of the compiler is a result, which the gate reports
        return Measurement(error=f"{type(error).__name__}: {str(error)[-400:]}")
    seconds = time.perf_counter() - start
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = output_of(tool("nvdisasm"), "-c", file.name)
        usage = re.search(r"REG:(\d+) STACK:(\d+)", output_of(tool("cuobjdump"), "-res-usage", file.name))
    assert usage is not None
    code, _ = instructions(sass)
    ptx = compiled.asm["ptx"]
    return Measurement(
        loops=loops(sass, case.block_m, case.num_warps),
        instructions=len(code),
        registers=int(usage[1]),
        stack=int(usage[2]),
        spills=sum(text.split(".")[0].split()[0] in ("LDL", "STL") for text in code),
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        trap=bool(re.search(r"^\s*trap;", ptx, re.MULTILINE)),
        serialised=serialised(ptx, case.arch),
        seconds=round(seconds, 1),
        accesses=dict(sorted(accesses(code).items())),
    )


def main() -> None:
    cases = [Case.from_json(line) for line in sys.stdin]
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(len(cases), os.cpu_count() or 1))
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for measurement in pool.map(measure, cases):
            print(json.dumps(measurement.to_fields()), flush=True)


if __name__ == "__main__":
    main()
