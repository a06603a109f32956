"""An adapter file on its way in: the spec, then chunks straight to disk, with every cap enforced while they arrive."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.validate import FileLimits, check_word
from hueshift.server.rpc.names import check_id
from hueshift.server.store.adapter_records import check_display_name, check_labels
from hueshift.server.store.adapter_store import AdapterStore
from hueshift.server.store.blobs import BlobWriter
from hueshift.server.store.idempotency import check_key
from hueshift.v1 import adapters_pb2 as pb

MAX_CHUNK = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Upload:
    """A spec that passed its checks, and the file that came with it. Its owner calls `file.discard` at the end."""

    spec: pb.ImportAdapterSpec
    file: BlobWriter


async def receive_upload(
    messages: AsyncIterator[pb.ImportAdapterRequest],
    store: AdapterStore,
    max_bytes: int,
    admit: Callable[[pb.ImportAdapterSpec], object] = lambda spec: None,
) -> Upload:
    """Read the whole stream. `admit` sees the spec before anything is written, in a thread, and raises to refuse it.

    Raises InvalidArgument: MESSAGE_OUT_OF_ORDER unless the spec comes first and once, UPLOAD_TOO_LARGE,
    UPLOAD_SIZE_MISMATCH, or INVALID_FIELD for a wrong spec. Nothing is left on disk then.
    """
    spec = await _receive_spec(messages)
    _check_spec(spec, max_bytes)
    await asyncio.to_thread(admit, spec)
    # Opening a file is quick, and in a thread a cancelled call could leave one that nobody knows.
    file = store.upload()
    try:
        async for message in messages:
            _check_chunk(message, file.size_bytes, spec.size_bytes)
            await asyncio.to_thread(file.write, message.chunk)
        if file.size_bytes != spec.size_bytes:
            raise _wrong_size(f"{file.size_bytes} bytes arrived", spec.size_bytes)
    except BaseException:
        file.discard()
        raise
    return Upload(spec, file)


async def _receive_spec(messages: AsyncIterator[pb.ImportAdapterRequest]) -> pb.ImportAdapterSpec:
    async for message in messages:
        part = message.WhichOneof("part")
        if part != "spec":
            raise _out_of_order(f"the first message carries {part or 'nothing'}; allowed: the spec")
        return message.spec
    raise _out_of_order("the stream ended without a message; send the spec, then the chunks")


def _check_spec(spec: pb.ImportAdapterSpec, max_bytes: int) -> None:
    if spec.adapter_id:
        check_id(spec.adapter_id, "spec.adapter_id")
    check_display_name(spec.display_name, "spec.display_name")
    check_labels(spec.labels, "spec.labels")
    check_key(spec.idempotency_key, "spec.idempotency_key")
    problem = check_word(spec.word) if spec.word else None
    if problem:
        raise InvalidArgument.for_field("spec.word", problem)
    if not 0 <= spec.rank <= FileLimits().max_rank:
        raise InvalidArgument.for_field("spec.rank", f"{spec.rank} given; allowed: 0 to {FileLimits().max_rank}")
    if spec.dense and spec.rank:
        raise InvalidArgument.for_field("spec.dense", f"given with rank {spec.rank}; allowed: one of them, or neither")
    if not 1 <= spec.size_bytes <= max_bytes:
        reason = Reason.UPLOAD_TOO_LARGE if spec.size_bytes > max_bytes else Reason.INVALID_FIELD
        raise InvalidArgument.for_field(
            "spec.size_bytes",
            f"{spec.size_bytes} given; allowed: 1 to {max_bytes} bytes (setting limits.max_adapter_bytes)",
            reason,
        )


def _check_chunk(message: pb.ImportAdapterRequest, received: int, expected: int) -> None:
    part = message.WhichOneof("part")
    if part != "chunk":
        raise _out_of_order(f"a message after the first carries {part or 'nothing'}; allowed: a chunk")
    size = len(message.chunk)
    if not 1 <= size <= MAX_CHUNK:
        reason = Reason.UPLOAD_TOO_LARGE if size else Reason.INVALID_FIELD
        raise InvalidArgument.for_field("chunk", f"{size} bytes given; allowed: 1 to {MAX_CHUNK} a message", reason)
    if received + size > expected:
        raise _wrong_size(f"more than {received + size - 1} bytes arrived", expected)


def _out_of_order(what: str) -> InvalidArgument:
    return InvalidArgument(Reason.MESSAGE_OUT_OF_ORDER, f"ImportAdapter: {what}")


def _wrong_size(what: str, expected: int) -> InvalidArgument:
    return InvalidArgument.for_field(
        "spec.size_bytes", f"{expected} given, but {what}; they must be equal", Reason.UPLOAD_SIZE_MISMATCH
    )
