"""Adapter files: one safetensors file per adapter, with a JSON header under the metadata key `hueshift`.

Tensors are named `spectral/<layer>` [rank], `norm/<layer>` [size], `lowrank/<layer>/a` [rank, cols],
`lowrank/<layer>/b` [rows, rank], `dense/<layer>` [rows, cols] and `tokens/<word>` [vectors, token_width], in fp16, bf16
or fp32; text_side.py names the parts of text-side adapters. A layer is one of the UNet or of a text encoder. Reading
checks the file's size, then its header, then what the header says against the base model, and only then touches a
tensor.

A file says `hueshift.adapter/1` unless it holds what that version does not know: 2 came with text-side parts, the kind
kv and the class noun, 3 with layers of the text encoder, 4 with the kind dense. So all files stay readable, and an
older server refuses a newer file by its version.
"""

import io
import json
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from hueshift.adapters.adapter import Adapter, AdapterKind, EncoderChange, LowRankFactors
from hueshift.adapters.container import DTYPES, ContainerHeader, TensorEntry, header_length, parse_header
from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.layout import BaseLayout, split_layers
from hueshift.adapters.tensors import TORCH_DTYPES, Packed, pack_pieces, read_tensor
from hueshift.adapters.text_parts import (
    has_text_side,
    read_gated,
    read_mappers,
    text_side_numbers,
    text_side_tensors,
)
from hueshift.adapters.validate import (
    FORMAT,
    FORMAT_DENSE,
    FORMAT_ENCODER,
    FORMAT_TEXT_SIDE,
    METADATA_KEY,
    AdapterHeader,
    FileLimits,
    plan_file,
    read_adapter_header,
)

# Enough to recognise a tar archive, whose mark lies at byte 257.
_START = 512


def write_adapter(adapter: Adapter) -> bytes:
    """Return the adapter as the bytes of a file, in one piece. Raises as `pack_adapter`."""
    return b"".join(pack_adapter(adapter))


def pack_adapter(adapter: Adapter) -> Packed:
    """Return the adapter as the pieces of a file, for what should not lie in memory twice.

    Equal adapters give equal bytes, whatever the order of their layers.

    Raises InvalidArgument (ADAPTER_DTYPE_UNSUPPORTED) for tensors that are not fp16, bf16 or fp32, and
    (ADAPTER_NOT_FINITE, ADAPTER_FILE_INVALID) for scales and other numbers that could not be read again.
    """
    tensors: dict[str, Tensor] = text_side_tensors(adapter)
    for part in (adapter, adapter.encoder):
        tensors.update({f"spectral/{layer}": tensor for layer, tensor in part.spectral.items()})
        tensors.update({f"norm/{layer}": tensor for layer, tensor in part.norm.items()})
    tensors.update({f"dense/{layer}": tensor for layer, tensor in adapter.dense.items()})
    tensors.update({f"tokens/{word}": tensor for word, tensor in adapter.tokens.items()})
    lowrank = {**adapter.lowrank, **adapter.encoder.lowrank}
    for layer, factors in lowrank.items():
        tensors[f"lowrank/{layer}/a"] = factors.a
        tensors[f"lowrank/{layer}/b"] = factors.b
    for layer, factors in lowrank.items():
        if not math.isfinite(factors.scale):
            raise InvalidArgument(Reason.ADAPTER_NOT_FINITE, f"the scale of layer {layer!r} is {factors.scale}")
    allowed = [TORCH_DTYPES[name] for name in DTYPES]
    for name, tensor in tensors.items():
        if tensor.dtype not in allowed:
            raise InvalidArgument(
                Reason.ADAPTER_DTYPE_UNSUPPORTED,
                f"tensor {name!r} has dtype {tensor.dtype}; allowed: {', '.join(map(str, allowed))}",
            )
    header: dict[str, Any] = {
        "format": FORMAT,
        "kind": adapter.kind.value,
        "base_hash": adapter.base_hash,
        "method": adapter.method,
        "identifier": adapter.identifier,
        "scales": {layer: float(factors.scale) for layer, factors in lowrank.items()},
    }
    version = _version(adapter)
    if version != FORMAT:
        header |= {"format": version, "class_noun": adapter.class_noun, **text_side_numbers(adapter)}
    return pack_pieces(tensors, {METADATA_KEY: json.dumps(header, sort_keys=True, separators=(",", ":"))})


def read_adapter(data: bytes | Path | io.BufferedIOBase, layout: BaseLayout, limits: FileLimits) -> Adapter:
    """Read and check an adapter file for the base model of `layout`. Every tensor owns its memory.

    An open file is read from its beginning and left open; it is read tensor by tensor, so nothing lies in memory twice.

    Raises InvalidArgument (UPLOAD_TOO_LARGE, ADAPTER_FILE_UNSAFE, ADAPTER_FILE_INVALID, ADAPTER_DTYPE_UNSUPPORTED,
    ADAPTER_TENSOR_UNKNOWN, ADAPTER_SHAPE_MISMATCH, ADAPTER_RANK_TOO_LARGE, ADAPTER_NOT_FINITE) or FailedPrecondition
    (ADAPTER_BASE_MISMATCH), naming the tensor, what it is and what is allowed.
    """
    with _open(data) as file:
        container, header = _read_headers(file, limits)
        plan = plan_file(container, header, layout, limits)

        def read(entry: TensorEntry) -> Tensor:
            return read_tensor(file, container.data_begin, entry)

        spectral, encoder_spectral = split_layers({layer: read(entry) for layer, entry in plan.spectral.items()})
        norm, encoder_norm = split_layers({layer: read(entry) for layer, entry in plan.norm.items()})
        lowrank, encoder_lowrank = split_layers(
            {layer: LowRankFactors(read(a), read(b), header.scales[layer]) for layer, (a, b) in plan.lowrank.items()}
        )
        return Adapter(
            kind=header.kind,
            base_hash=header.base_hash,
            method=header.method,
            spectral=spectral,
            norm=norm,
            lowrank=lowrank,
            tokens={word: read(entry) for word, entry in plan.tokens.items()},
            identifier=header.identifier,
            token_grids={word: read(entry) for word, entry in plan.text_side.grids.items()},
            mappers=read_mappers(plan.text_side, header.mappers, read),
            kv={layer: read(entry) for layer, entry in plan.text_side.kv.items()},
            gated=read_gated(plan.text_side, header.gated, read),
            class_noun=header.class_noun,
            encoder=EncoderChange(encoder_spectral, encoder_norm, encoder_lowrank),
            dense={layer: read(entry) for layer, entry in plan.dense.items()},
        )


def peek_header(data: bytes | Path, limits: FileLimits | None = None) -> AdapterHeader:
    """Read only what a file says of itself, whatever its base model. Raises InvalidArgument as `read_adapter`."""
    with _open(data) as file:
        return _read_headers(file, limits or FileLimits())[1]


def _version(adapter: Adapter) -> str:
    if adapter.kind is AdapterKind.DENSE or adapter.dense:
        return FORMAT_DENSE
    if adapter.encoder:
        return FORMAT_ENCODER
    newer = adapter.kind is AdapterKind.KV or adapter.class_noun or has_text_side(adapter)
    return FORMAT_TEXT_SIDE if newer else FORMAT


def _open(data: bytes | Path | io.BufferedIOBase) -> AbstractContextManager[io.BufferedIOBase]:
    if isinstance(data, bytes):
        return io.BytesIO(data)
    return data.open("rb") if isinstance(data, Path) else nullcontext(data)


def _read_headers(file: io.BufferedIOBase, limits: FileLimits) -> tuple[ContainerHeader, AdapterHeader]:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if size > limits.max_bytes:
        raise InvalidArgument(
            Reason.UPLOAD_TOO_LARGE, f"the adapter file has {size} bytes; allowed: at most {limits.max_bytes_text}"
        )
    start = file.read(_START)
    length = header_length(start, size, limits.max_header_bytes)
    file.seek(8)
    container = parse_header(file.read(length), size, limits.max_tensors)
    return container, read_adapter_header(container)
