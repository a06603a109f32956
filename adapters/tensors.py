"""Tensors in and out of containers: the only place where bytes of a file become values."""

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hueshift.adapters.container import METADATA, PREFIX, TensorEntry, invalid
from hueshift.adapters.errors import InvalidArgument, Reason

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A container in pieces: its header, then each tensor's bytes as they lie in memory, in the order of the file.

    Nothing is copied but what is on another device or not contiguous, one tensor at a time: full deltas of Stable
    Diffusion 1.x have 1.7 GB.
    """

    head: bytes
    tensors: tuple[Tensor, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.head) + sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def __iter__(self) -> Iterator[bytes | memoryview]:
        """Yield the pieces. The tensors must not change meanwhile."""
        yield self.head
        for tensor in self.tensors:
            yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a container of the tensors in one piece, as `pack_pieces` describes it."""
    return b"".join(pack_pieces(tensors, metadata))


def pack_pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Packed:
    """Return a container of the tensors. Equal content gives equal bytes.

    Wider dtypes come first, so that every tensor stays aligned; then names in order.
    """
    names_of = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    position = 0
    for name in order:
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": names_of[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % PREFIX)
    return Packed(len(text).to_bytes(PREFIX, "little") + text, tuple(tensors[name] for name in order))


def read_tensor(file: io.BufferedIOBase, data_begin: int, entry: TensorEntry) -> Tensor:
    """Read one tensor, which owns its memory. Raises InvalidArgument (ADAPTER_FILE_INVALID, ADAPTER_NOT_FINITE)."""
    if 0 in entry.shape:
        return torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
    # A buffer of its own: aligned whatever the place in the file, and the file's bytes are not kept alive.
    buffer = bytearray(entry.end - entry.begin)
    file.seek(data_begin + entry.begin)
    if file.readinto(buffer) != len(buffer):
        raise invalid(f"the file ends inside tensor {entry.name!r}")
    tensor = torch.frombuffer(buffer, dtype=TORCH_DTYPES[entry.dtype]).reshape(entry.shape)
    check_finite(entry.name, tensor)
    return tensor


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise InvalidArgument (ADAPTER_NOT_FINITE) with the place of the first value that is NaN or infinite."""
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return
    place = tuple((~finite).nonzero()[0].tolist())
    raise InvalidArgument(
        Reason.ADAPTER_NOT_FINITE,
        f"adapter file refused: tensor {name!r} is {float(tensor[place])} at {list(place)}; allowed: finite values",
    )
