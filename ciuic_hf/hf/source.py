"""A model that is not loaded: its config.json, and the headers of its files, here or on the hub."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ciuic_hf.checkpoint import (
    TensorHeader,
    checkpoint_files,
    data_nbytes,
    read_config,
    read_header,
    tensor_header,
)
from ciuic_hf.errors import CiuicError

CONFIG = "config.json"


@dataclass(frozen=True)
class Source:
    """What is known of a model before a weight is read.

    Attributes:
        name: as the user wrote it.
        config: of transformers, without the quantization of the files.
        quantization: that of the files, None for plain ones.
        headers: of every tensor in the files that were found, None when there are none.
        files: how many the checkpoint has.
        absent: names of those that are not there.
    """

    name: str
    config: Any
    quantization: dict[str, Any] | None
    headers: list[TensorHeader] | None
    files: int = 0
    absent: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(header.nbytes for header in self.headers or [])

    @property
    def dtype_nbytes(self) -> dict[str, int]:
        """safetensors dtype -> bytes, largest first."""
        counted: Counter[str] = Counter()
        for header in self.headers or []:
            counted[header.dtype] += header.nbytes
        return dict(counted.most_common())


def open_source(name: str, revision: str | None = None) -> Source:
    """Read config.json and headers of a directory, of the model beside a config.json, or of a hub repository.

    Of a repository whose files are not in the local cache, config.json is downloaded and the headers are read by
    range requests; weights never are.

    Raises:
        CiuicError: for a name that is nothing of these, a hub that does not answer, damaged headers, a model that is
            quantized in another way than FP8, or one that transformers does not know.
    """
    path = Path(name)
    if path.exists():
        directory = path if path.is_dir() else path.parent
        if revision is not None:
            raise CiuicError(
                f"{name} is on this machine, where there is no revision {revision}; leave it out."
            )
        return _described(name, path if path.is_file() else directory / CONFIG, *_local(directory))
    config = _download_config(name, revision)
    local = _local(config.parent)
    if local[0] is not None and not local[2]:
        return _described(name, config, *local)
    return _described(name, config, *_remote(name, revision))


def _local(directory: Path) -> tuple[list[TensorHeader] | None, int, tuple[str, ...]]:
    """Headers of the files in a directory, the number of files that its index names, and those not there."""
    if not any(directory.glob("model*.safetensors*")):
        return None, 0, ()
    files = checkpoint_files(directory)
    there = [file for file in files if file.is_file()]
    headers = [header for file in there for header in read_header(file)]
    return headers, len(files), tuple(file.name for file in files if file not in there)


def _described(
    name: str, path: Path, headers: list[TensorHeader] | None, files: int, absent: tuple[str, ...]
) -> Source:
    from transformers import AutoConfig

    if path.name != CONFIG:
        raise CiuicError(f"{name} is not a model: give its directory, its config.json or a hub repository.")
    written = read_config(path.parent)
    try:
        config = AutoConfig.from_pretrained(path.parent)
    except (ValueError, KeyError) as error:
        raise CiuicError(
            f"{name} has a config.json that this transformers cannot read ({str(error).splitlines()[0]}); upgrade "
            "transformers or check the file."
        ) from None
    quantization = written.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method", "by a method without a name")
        if method != "fp8":
            raise CiuicError(
                f"{name} is quantized already ({method}); plans are made for bf16 and FP8 models."
            )
        del config.quantization_config
    return Source(name, config, quantization, headers, files, absent)


def _download_config(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(hf_hub_download(name, CONFIG, revision=revision))
    except GatedRepoError:
        raise CiuicError(
            f"{name} is gated: accept its terms on the hub and log in with `hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise CiuicError(f"{name} has no revision {revision} on the hub.") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise CiuicError(
            f"{name} is neither a directory here nor a repository that the hub shows you; check the spelling, or log "
            "in with `hf auth login` if it is private."
        ) from None
    except LocalEntryNotFoundError:
        raise CiuicError(
            f"{name} is no directory here and the hub cannot be reached; give the directory of a model."
        ) from None
    except EntryNotFoundError:
        raise CiuicError(f"{name} has no config.json on the hub; it is no transformers model.") from None


def _remote(name: str, revision: str | None) -> tuple[list[TensorHeader], int, tuple[str, ...]]:
    """Headers of a hub repository, by range requests."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        NotASafetensorsRepoError,
        OfflineModeIsEnabled,
        SafetensorsParsingError,
    )

    # httpx's own, which is another module in other releases of huggingface_hub
    any_http_error = cast("type[Exception]", HfHubHTTPError.__bases__[0])
    try:
        found = HfApi().get_safetensors_metadata(name, revision=revision)
    except NotASafetensorsRepoError:
        raise CiuicError(f"{name} has no safetensors files on the hub; Ciuic reads no others.") from None
    except SafetensorsParsingError as error:
        raise CiuicError(f"{name} has a damaged safetensors header on the hub: {error}") from None
    except (any_http_error, OfflineModeIsEnabled) as error:
        raise CiuicError(
            f"The headers of {name} cannot be read from the hub ({type(error).__name__}); try again, or give a "
            "directory."
        ) from None
    headers = []
    for file, content in found.files_metadata.items():
        path = Path(name) / file
        entries = {
            key: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
            for key, info in content.tensors.items()
        }
        tensors = [tensor_header(key, entry, path) for key, entry in entries.items()]
        data_nbytes(entries, tensors, path)
        headers += tensors
    return headers, len(found.files_metadata), ()
