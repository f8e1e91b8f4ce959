"""What a Hugging Face checkpoint folder says about a model's tensors, read without torch.

Owns the safetensors header, the index and the facts of ``config.json``; tensor data is never read. Invariant: only
regular files directly inside the folder are opened, each header is bounded before it is read, and anything that is not
as the format says ends as ``CheckpointUnreadable``, never as a guess at names or shapes.

Which files count is what SGLang's loader takes (srt/model_loader/weight_utils.py, 0.5.15.post1 to 0.5.23): those that
``model.safetensors.index.json`` names, with every tensor in them; without an index all, but for Mistral's
``consolidated*`` beside others.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
# The format's own bound.
MAX_HEADER_BYTES = 100_000_000
# The index has one line per tensor and config.json is shorter: a larger file is something else.
MAX_JSON_BYTES = 100_000_000
MAX_DIMENSION = 2**63 - 1

# torch's names, as in sidecar.manifest.ITEM_SIZES, by the header's.
_TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class CheckpointUnreadable(Exception):
    """One sentence that says what cannot be read, where, and what to do; nothing is known of the model then."""


@dataclass(frozen=True, slots=True)
class KnownTensor:
    """What a tensor is known to be, its name aside."""

    dtype: str
    """torch's name, or the header's own where torch's is not known."""
    shape: tuple[int, ...]
    """Of the whole tensor; () for a scalar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model's tensors by their Hugging Face names, and the facts of its config."""

    tensors: Mapping[str, KnownTensor]
    tied_embeddings: bool = False
    """Whether ``lm_head.weight`` is the embedding. Where the config does not say: whether the files lack it."""
    num_hidden_layers: int | None = None
    num_nextn_predict_layers: int | None = None
    """Draft layers (MTP) that follow after the hidden ones."""
    architectures: tuple[str, ...] = ()
    """Names of the model's class; empty if unknown."""


def read(folder: Path) -> Checkpoint:
    """Read names, dtypes, shapes and config facts; raises ``CheckpointUnreadable``."""
    with _readable(folder):
        _check_folder(folder)
        config = _Config.read(folder)
        tensors = _indexed_tensors(folder) if (folder / INDEX).exists() else _all_tensors(folder)
    return Checkpoint(
        tensors=tensors,
        tied_embeddings=config.tied_embeddings(tensors),
        num_hidden_layers=config.count("num_hidden_layers"),
        num_nextn_predict_layers=config.count("num_nextn_predict_layers"),
        architectures=config.architectures(),
    )


def fingerprint(folder: Path) -> str:
    """Tell two states of a folder apart without opening a file; raises ``CheckpointUnreadable``.

    Names, sizes and modification times of all that ``read`` reads: as long as it stays the same, so does the result.
    """
    lines = hashlib.sha256()
    with _readable(folder):
        _check_folder(folder)
        for path in [folder / CONFIG, folder / INDEX, *_all_weight_files(folder)]:
            if path.exists():
                stat = path.stat()
                lines.update(f"{path.name}\t{stat.st_mtime_ns}\t{stat.st_size}\n".encode())
    return lines.hexdigest()


@dataclass(frozen=True, slots=True)
class _Config:
    """``config.json``. A multimodal model keeps its language model's facts one level down."""

    values: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "_Config":
        path = folder / CONFIG
        return cls(_json_object(path)) if path.exists() else cls()

    def tied_embeddings(self, tensors: Iterable[str]) -> bool:
        # Of the two levels the outer one is what SGLang asks (models/qwen3_vl.py, mimo_v2.py). Neither may say it:
        # Gemma's config relies on its class.
        for values in (self.values, self._text()):
            said = values.get("tie_word_embeddings")
            if isinstance(said, bool):
                return said
        return not any(name == "lm_head.weight" or name.endswith(".lm_head.weight") for name in tensors)

    def count(self, name: str) -> int | None:
        for values in (self._text(), self.values):
            number = values.get(name)
            if isinstance(number, int) and not isinstance(number, bool) and number >= 0:
                return number
        return None

    def architectures(self) -> tuple[str, ...]:
        names = self.values.get("architectures")
        return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()

    def _text(self) -> Mapping[str, Any]:
        nested = self.values.get("text_config")
        return nested if isinstance(nested, dict) else {}


def _check_folder(folder: Path) -> None:
    # A relative path would be looked up from the sidecar's working directory, which need not be the engine's.
    if not folder.is_absolute() or not folder.is_dir():
        raise CheckpointUnreadable(
            f"{str(folder)!r} is not the absolute path of a folder on this host (the id of a model on a hub?): "
            "start the engine with a local folder that the sidecar can see"
        )


def _all_weight_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.endswith(".safetensors"))


def _all_tensors(folder: Path) -> dict[str, KnownTensor]:
    paths = _all_weight_files(folder)
    if not paths:
        raise CheckpointUnreadable(
            f"{folder} holds neither {INDEX} nor a .safetensors file, so its tensors' names are unknown: "
            "save the checkpoint as safetensors"
        )
    return _tensors_of([path for path in paths if not path.name.startswith("consolidated")] or paths)


def _indexed_tensors(folder: Path) -> dict[str, KnownTensor]:
    weight_map = _weight_map(folder / INDEX)
    tensors = _tensors_of([folder / file for file in sorted(set(weight_map.values()))])
    for name, file in weight_map.items():
        if name not in tensors:
            raise CheckpointUnreadable(
                f"{folder / INDEX} places tensor {name!r} in {file!r}, which does not hold it: "
                "copy the checkpoint again"
            )
    return tensors


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = _json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointUnreadable(f"{path} has no weight_map: copy the checkpoint again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            raise CheckpointUnreadable(
                f"{path} places tensor {name!r} in {file!r}, which is not a file inside the folder: mend the index"
            )
    return weight_map


def _is_plain_name(file: str) -> bool:
    return file not in ("", ".", "..") and not any(part in file for part in ("/", "\\", "\0"))


def _tensors_of(paths: Iterable[Path]) -> dict[str, KnownTensor]:
    return {name: tensor for path in paths for name, tensor in _header(path).items()}


def _header(path: Path) -> dict[str, KnownTensor]:
    with _readable(path), _regular(path).open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        # A file of less than eight bytes ends up here too: its header is longer than nothing.
        if not 2 <= num_bytes <= MAX_HEADER_BYTES or 8 + num_bytes > os.fstat(file.fileno()).st_size:
            raise _broken(path, f"its header would be {num_bytes} bytes long")
        text = file.read(num_bytes)
    entries = _parse(path, text)
    return {name: _known_tensor(path, name, entry) for name, entry in entries.items() if name != "__metadata__"}


def _known_tensor(path: Path, name: str, entry: Any) -> KnownTensor:
    dtype, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
    if not isinstance(dtype, str) or not isinstance(shape, list) or not all(map(_is_dimension, shape)):
        raise _broken(path, f"tensor {name!r} has no dtype and shape")
    return KnownTensor(_TORCH_DTYPES.get(dtype, dtype), tuple(shape))


def _is_dimension(size: Any) -> bool:
    return type(size) is int and 0 <= size <= MAX_DIMENSION


def _json_object(path: Path) -> dict[str, Any]:
    with _readable(path):
        if _regular(path).stat().st_size > MAX_JSON_BYTES:
            raise _broken(path, f"it is longer than {MAX_JSON_BYTES} bytes")
        text = path.read_bytes()
    return _parse(path, text)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise _broken(path, "not a JSON object")
    return value


def _regular(path: Path) -> Path:
    """Keep out what could block or never end, such as a pipe; a link to a file is one (the hub's cache has links)."""
    if path.exists() and not path.is_file():
        raise CheckpointUnreadable(f"{path} is not a regular file: take it out of the checkpoint")
    return path


def _broken(path: Path, why: str) -> CheckpointUnreadable:
    return CheckpointUnreadable(f"{path} is broken or not complete ({why}): copy the checkpoint again")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what the operating system says into ``CheckpointUnreadable``."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointUnreadable(f"{path} is missing: copy the checkpoint again") from error
    except OSError as error:
        raise CheckpointUnreadable(
            f"{path} cannot be read ({error.strerror or error}): let the sidecar's user read it"
        ) from error
