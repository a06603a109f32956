"""A file of another program, opened: a checked header, then tensors one by one. Every tensor must be accounted for."""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hueshift.adapters.container import (
    TensorEntry,
    expect_shape,
    header_length,
    invalid,
    parse_header,
    parse_json,
    wrong_shape,
)
from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.tensors import read_tensor
from hueshift.adapters.validate import FileLimits

# Enough to recognise a tar archive, whose mark lies at byte 257.
_START = 512


class ForeignFile:
    """Reads tensors by name and remembers which ones were asked for; `leftover` is what nobody understood.

    Raises InvalidArgument (UPLOAD_TOO_LARGE, ADAPTER_FILE_UNSAFE, ADAPTER_FILE_INVALID, ADAPTER_DTYPE_UNSUPPORTED) when
    it is opened, as native files do.
    """

    def __init__(self, data: bytes | Path, limits: FileLimits) -> None:
        self._file: io.BufferedIOBase = io.BytesIO(data) if isinstance(data, bytes) else data.open("rb")
        try:
            size = self._file.seek(0, io.SEEK_END)
            self._file.seek(0)
            if size > limits.max_bytes:
                raise InvalidArgument(
                    Reason.UPLOAD_TOO_LARGE,
                    f"the adapter file has {size} bytes; allowed: at most {limits.max_bytes_text}",
                )
            length = header_length(self._file.read(_START), size, limits.max_header_bytes)
            self._file.seek(8)
            self.header = parse_header(self._file.read(length), size, limits.max_tensors, foreign=True)
        except BaseException:
            self._file.close()
            raise
        self._untouched = dict.fromkeys(self.header.tensors)

    def __enter__(self) -> "ForeignFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Every tensor by its name, in the file's order."""
        return self.header.tensors

    @property
    def metadata(self) -> Mapping[str, str]:
        """The header's texts, which may say anything."""
        return self.header.metadata

    @property
    def leftover(self) -> list[str]:
        """Names that were neither read nor skipped."""
        return list(self._untouched)

    def skip(self, name: str) -> None:
        """Take note of a tensor without reading it."""
        self._untouched.pop(name, None)

    def read(self, name: str) -> Tensor:
        """Read a tensor of floating-point values; fp64 becomes fp32.

        Raises InvalidArgument (ADAPTER_NOT_FINITE, ADAPTER_DTYPE_UNSUPPORTED, ADAPTER_SHAPE_MISMATCH).
        """
        entry = self.entries[name]
        if 0 in entry.shape:
            raise wrong_shape(entry, "at least one value")
        self.skip(name)
        tensor = read_tensor(self._file, self.header.data_begin, entry)
        if not tensor.is_floating_point():
            raise InvalidArgument(
                Reason.ADAPTER_DTYPE_UNSUPPORTED,
                f"adapter file refused: tensor {name!r} has dtype {entry.dtype}; allowed: F16, BF16, F32, F64",
            )
        if tensor.dtype is torch.float64:
            tensor = tensor.float()
            if not bool(torch.isfinite(tensor).all()):
                raise InvalidArgument(
                    Reason.ADAPTER_NOT_FINITE, f"adapter file refused: tensor {name!r} does not fit into fp32"
                )
        return tensor

    def number(self, name: str) -> float:
        """Read a tensor that holds a single number. Raises InvalidArgument (ADAPTER_SHAPE_MISMATCH) on others."""
        entry = self.entries[name]
        if math.prod(entry.shape) != 1:
            raise InvalidArgument(
                Reason.ADAPTER_SHAPE_MISMATCH,
                f"adapter file refused: tensor {name!r} has shape {list(entry.shape)}; allowed: a single number",
            )
        self.skip(name)
        return float(read_tensor(self._file, self.header.data_begin, entry).item())

    def read_shaped(self, name: str, *shape: int) -> Tensor:
        """Read a tensor of this shape. Raises InvalidArgument (ADAPTER_SHAPE_MISMATCH) on others, and as `read`."""
        found = self.entries.get(name)
        if found is None:
            raise invalid(f"it has no tensor {name!r} {list(shape)}, which files of its format hold")
        expect_shape(found, shape)
        return self.read(name)

    def stated_number(self, key: str) -> float | None:
        """Return a metadata text that holds a number; None if absent. Raises InvalidArgument on another."""
        text = self.metadata.get(key)
        if text is None:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise invalid(f"the metadata {key!r} is {text[:80]!r}; allowed: a finite number")
        return value

    def json(self, key: str) -> dict[str, Any] | None:
        """Return a metadata text that holds a JSON object; None if absent. Raises InvalidArgument on another."""
        text = self.metadata.get(key)
        if text is None:
            return None
        value = parse_json(text, f"the metadata {key!r}")
        if not isinstance(value, dict):
            raise invalid(f"the metadata {key!r} is not a JSON object")
        return value
