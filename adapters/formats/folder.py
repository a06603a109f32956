"""A folder that a program wrote, as one file: what an upload can carry. torch is not needed; no tensor is touched.

PEFT's adapter_config.json travels as metadata, pieces of a sharded model are joined, and Textual Inversion words, text
encoder shifts and the like that lie beside the main file come along, so that nothing of a folder is silently forgotten.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hueshift.adapters.container import (
    METADATA,
    PREFIX,
    ContainerHeader,
    TensorEntry,
    header_length,
    invalid,
    parse_header,
)
from hueshift.adapters.formats.peft_config import FOLDER_KEY
from hueshift.adapters.validate import FileLimits

_CONFIG = "adapter_config.json"
_START = 512
_MAX_CONFIG = 1024 * 1024
# Embeddings of A1111, as DreamArtist makes them in pairs, are told apart by their files' names alone.
_NAMELESS = "emb_params"
# Prefixes that name the network of a file which does not say it in its own names.
_TEXT_FILES = ("spectral_shifts_te.safetensors",)


@dataclass(frozen=True, slots=True)
class _Piece:
    data: bytes
    header: ContainerHeader
    prefix: str
    word: str = ""


@dataclass(frozen=True, slots=True)
class Bundle:
    """What can be uploaded, and what of the folder is not part of it."""

    data: bytes
    note: str = ""


def bundle(path: Path) -> Bundle:
    """Return a file's bytes, or a folder as the bytes of one file.

    A folder of a whole model gives its `unet`, with a note of the other networks. Raises InvalidArgument
    (ADAPTER_FILE_INVALID) for a folder without safetensors files, or whose files name a tensor twice; OSError when
    something cannot be read.
    """
    if not path.is_dir():
        return Bundle(path.read_bytes())
    folder = path / "unet" if (path / "unet").is_dir() else path
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f" {others[0]} is a pickle, which can run code when it is loaded: convert it first." if others else ""
        raise invalid(f"the folder {path.name!r} holds no safetensors file.{found}")
    config = folder / _CONFIG
    extra = {FOLDER_KEY: _read_config(config)} if config.is_file() else {}
    if len(files) == 1 and not extra:
        return Bundle(files[0].read_bytes(), _others(path, folder))
    return Bundle(_join([_open(file) for file in files], extra), _others(path, folder))


def _others(path: Path, folder: Path) -> str:
    if folder == path:
        return ""
    names = sorted(f"{inner.name}/" for inner in path.iterdir() if inner != folder and any(inner.glob("*.safetensors")))
    return f"of this model folder only unet/ is read, not {', '.join(names)}" if names else ""


def _read_config(file: Path) -> str:
    if file.stat().st_size > _MAX_CONFIG:
        raise invalid(f"{file.name} has {file.stat().st_size} bytes; allowed: at most {_MAX_CONFIG}")
    return file.read_text(encoding="utf-8")


def _open(file: Path) -> _Piece:
    data, limits = file.read_bytes(), FileLimits()
    length = header_length(data[:_START], len(data), limits.max_header_bytes)
    header = parse_header(data[PREFIX : PREFIX + length], len(data), limits.max_tensors, foreign=True)
    nameless = list(header.tensors) == [_NAMELESS]
    word = header.metadata.get("name") or file.stem if nameless else ""
    return _Piece(data, header, "text_encoder." if file.name in _TEXT_FILES else "", word)


def _join(pieces: Sequence[_Piece], extra: Mapping[str, str]) -> bytes:
    metadata: dict[str, str] = {}
    header: dict[str, Any] = {}
    position = 0
    for piece in pieces:
        metadata |= piece.header.metadata
        for name, entry in _named(piece):
            if name in header:
                raise invalid(f"two files of the folder hold a tensor {name!r}")
            begin = position + entry.begin
            header[name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [begin, begin + entry.end - entry.begin],
            }
        position += len(piece.data) - piece.header.data_begin
    text = json.dumps({METADATA: {**metadata, **extra}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % PREFIX)
    bodies = (memoryview(piece.data)[piece.header.data_begin :] for piece in pieces)
    return b"".join([len(text).to_bytes(PREFIX, "little"), text, *bodies])


def _named(piece: _Piece) -> Iterator[tuple[str, TensorEntry]]:
    if piece.word:
        return ((f"bundle_emb.{piece.word}.{name}", entry) for name, entry in piece.header.tensors.items())
    return ((f"{piece.prefix}{name}", entry) for name, entry in piece.header.tensors.items())
