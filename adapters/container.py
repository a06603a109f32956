"""The safetensors container: an 8-byte little-endian header length, a JSON header, then the bytes of the tensors.

Everything about the header is checked here before any tensor byte is read. The format is read by hand because the order
of checks is the point: caps first, then JSON, then types and places. It is the format of the safetensors project.
torch is not imported here, so that a file can be looked at quickly.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from hueshift.adapters.errors import InvalidArgument, Reason

# Bytes of a value, by the name of its type in a header: in our own files, and in those that other programs write.
DTYPES: Mapping[str, int] = {"F16": 2, "BF16": 2, "F32": 4}
FOREIGN_DTYPES: Mapping[str, int] = {**DTYPES, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
METADATA = "__metadata__"
PREFIX = 8
# Longest tensor name: a layer path of 62 characters in the embedded model, under 100 in SDXL.
_MAX_NAME = 256
_MAX_DIMENSIONS = 8
_MAX_SIZE = 2**40
# One half of a surrogate pair, or a whole pair, as JSON escapes them.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
# How files of other formats begin. A pickle can run any code when it is loaded, and so can what these may contain.
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes (a pickle inside)"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"(dp", "a Python pickle in text form"),
    (b"(lp", "a Python pickle in text form"),
    (b"ccopy_reg", "a Python pickle in text form"),
    (b"cos\n", "a Python pickle in text form"),
    (b"cposix\n", "a Python pickle in text form"),
    (b"c__builtin__", "a Python pickle in text form"),
    (b"cbuiltins", "a Python pickle in text form"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy file"),
    (b"GGUF", "a GGUF file"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
    (b"#!", "a script"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"RIFF", "a RIFF file, such as a WebP picture"),
    (b"<!", "an HTML page"),
    (b"<?xml", "an XML file"),
    (b"<html", "an HTML page"),
    (b'{"', "a JSON file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the file: `begin` and `end` are bytes after the header, `dtype` is the header's name for it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class ContainerHeader:
    """A checked header. `data_begin` is where the tensors' bytes begin in the file."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_begin: int


def header_length(start: bytes, file_size: int, max_header: int) -> int:
    """Return the length of the JSON header, given the first bytes of the file (at least 512 where it has them).

    Raises InvalidArgument: ADAPTER_FILE_UNSAFE naming another format by its content, ADAPTER_FILE_INVALID otherwise.
    """
    length = int.from_bytes(start[:PREFIX], "little")
    plausible = file_size > PREFIX + 1 and start[PREFIX : PREFIX + 1] == b"{" and PREFIX + length <= file_size
    if not plausible:
        _refuse_other_formats(start)
        raise invalid(
            f"the file of {file_size} bytes is not a safetensors file: its first 8 bytes promise a header of {length} "
            "bytes that begins with '{'"
        )
    if length > max_header:
        raise invalid(f"the header has {length} bytes; allowed: at most {max_header}")
    return length


def parse_header(header: bytes, file_size: int, max_tensors: int, *, foreign: bool = False) -> ContainerHeader:
    """Check the JSON header of a file of `file_size` bytes. Raises InvalidArgument naming what does not fit.

    Files that other programs wrote (`foreign`) may also hold single numbers, tensors without values and the types of
    FOREIGN_DTYPES.
    """
    data = parse_json(header, "the header")
    if not isinstance(data, dict):
        raise invalid("the header is not a JSON object")
    metadata = data.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise invalid(f"{METADATA} of the header must map text to text")
    if len(data) > max_tensors:
        raise invalid(f"the file holds {len(data)} tensors; allowed: at most {max_tensors}")
    data_begin = PREFIX + len(header)
    entries = [_read_entry(name, value, foreign) for name, value in data.items()]
    _check_places(entries, file_size - data_begin)
    return ContainerHeader({entry.name: entry for entry in entries}, metadata, data_begin)


def parse_json(text: bytes | str, what: str) -> Any:
    """Parse strict JSON: no repeated keys, no NaN or Infinity, no half of a surrogate pair, which no answer could tell.

    Raises InvalidArgument (ADAPTER_FILE_INVALID).
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        if _HALF.search(text) is not None:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        raise invalid(
            f"{what} holds {error.object[error.start]!r}, half of a surrogate pair, which is no text"
        ) from error
    except (ValueError, RecursionError) as error:
        cause = "it is nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise invalid(f"{what} is not valid JSON: {cause}") from error


def invalid(message: str) -> InvalidArgument:
    """Build the error for a file that is not well formed."""
    return InvalidArgument(Reason.ADAPTER_FILE_INVALID, f"adapter file refused: {message}")


def show(value: Any) -> str:
    """Return a short text of a parsed value for a message. Nested values are only named: showing them may not end."""
    if isinstance(value, str):
        return repr(value[:80])
    if isinstance(value, list) and len(value) <= _MAX_DIMENSIONS and all(type(item) in (int, float) for item in value):
        return "[" + ", ".join(show(item) for item in value) + "]"
    if value is None or isinstance(value, bool | int | float):
        return str(value)[:40]
    return f"a {type(value).__name__} of {len(value)}" if isinstance(value, dict | list) else type(value).__name__


def expect_shape(entry: TensorEntry, shape: tuple[int, ...]) -> None:
    """Raise InvalidArgument (ADAPTER_SHAPE_MISMATCH) unless the tensor has this shape."""
    if entry.shape != shape:
        raise wrong_shape(entry, str(list(shape)))


def wrong_shape(entry: TensorEntry, allowed: str) -> InvalidArgument:
    """Build the error for a tensor of another shape than the base model asks for."""
    return InvalidArgument(
        Reason.ADAPTER_SHAPE_MISMATCH,
        f"adapter file refused: tensor {entry.name!r} has shape {list(entry.shape)}; allowed: {allowed}",
    )


def unknown_tensor(entry: TensorEntry, why: str) -> InvalidArgument:
    """Build the error for a tensor that has no place in an adapter."""
    return InvalidArgument(
        Reason.ADAPTER_TENSOR_UNKNOWN, f"adapter file refused: tensor {entry.name!r} is unknown: {why}"
    )


def is_finite(value: float) -> bool:
    """Return whether a number of a header fits into a float: JSON may write integers of any size."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _refuse_other_formats(start: bytes) -> None:
    found = next((name for signature, name in _SIGNATURES if start.startswith(signature)), None)
    if found is None and start[257:262] == b"ustar":
        found = "a tar archive"
    if found is None:
        return
    raise InvalidArgument(
        Reason.ADAPTER_FILE_UNSAFE,
        f"adapter file refused: by its content it is {found}; allowed: a safetensors file. Other formats "
        "are never opened, because some run code when they are loaded. Where you trust it, convert it: "
        "docs/adapters.md has the lines for common programs.",
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {repeated[:80]!r} is given twice")
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _read_entry(name: str, value: Any, foreign: bool) -> TensorEntry:
    if not 1 <= len(name) <= _MAX_NAME:
        raise invalid(f"a tensor name has {len(name)} characters; allowed: 1 to {_MAX_NAME}")
    shown = repr(name[:120])
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise invalid(f"tensor {shown} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    dtypes = FOREIGN_DTYPES if foreign else DTYPES
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise InvalidArgument(
            Reason.ADAPTER_DTYPE_UNSUPPORTED,
            f"adapter file refused: tensor {shown} has dtype {show(dtype)}; allowed: {', '.join(dtypes)}",
        )
    # diffusers marks attentions that have no weights by tensors without values.
    if not _are_sizes(shape, 0 if foreign else 1, _MAX_DIMENSIONS) and not (foreign and shape == []):
        raise invalid(f"tensor {shown} has shape {show(shape)}; allowed: 1 to {_MAX_DIMENSIONS} whole numbers >= 1")
    if not _are_sizes(offsets, 0, 2) or len(offsets) != 2:
        raise invalid(f"tensor {shown} has data_offsets {show(offsets)}; allowed: two whole numbers >= 0")
    begin, end = offsets
    size = prod(shape) * dtypes[dtype]
    if end - begin != size:
        raise invalid(f"tensor {shown} of {size} bytes has data_offsets {begin} to {end}")
    return TensorEntry(name, dtype, tuple(shape), begin, end)


def _are_sizes(value: Any, smallest: int, longest: int) -> bool:
    return (
        isinstance(value, list)
        and 1 <= len(value) <= longest
        and all(type(item) is int and smallest <= item <= _MAX_SIZE for item in value)
    )


def _check_places(entries: list[TensorEntry], data_size: int) -> None:
    position = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position:
            raise invalid(
                f"tensor {entry.name[:120]!r} begins at byte {entry.begin} of the data; expected {position}: tensors "
                "must follow each other without gaps or overlaps"
            )
        position = entry.end
    if position != data_size:
        raise invalid(f"the tensors end at byte {position} of the data, but the file holds {data_size} bytes of it")
