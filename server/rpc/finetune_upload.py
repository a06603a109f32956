"""Pictures on their way in: the spec, then chunks straight to disk, with every cap enforced while they arrive."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.server.job_folders import JobFolders
from hueshift.server.rpc.names import check_id
from hueshift.server.settings import LimitSettings
from hueshift.server.store.adapter_records import check_display_name, check_labels
from hueshift.server.store.idempotency import check_key
from hueshift.training.checks import MAX_INIT_WORDS, MAX_SAMPLE_PROMPTS, MAX_SUBJECTS, check_count
from hueshift.v1 import finetune_pb2 as pb

MAX_CHUNK = 1024 * 1024


async def receive_spec(messages: AsyncIterator[pb.CreateFineTuneRequest], limits: LimitSettings) -> pb.FineTuneSpec:
    """Read the first message. Raises InvalidArgument: MESSAGE_OUT_OF_ORDER, or a wrong name, label or picture size."""
    async for message in messages:
        part = message.WhichOneof("part")
        if part != "spec":
            raise _out_of_order(f"the first message carries {part or 'nothing'}; allowed: the spec")
        _check_spec(message.spec, limits)
        return message.spec
    raise _out_of_order("the stream ended without a message; send the spec, then the pictures")


def announced_bytes(spec: pb.FineTuneSpec) -> int:
    """Return the bytes of all pictures and masks that are to follow a spec."""
    return sum(picture.size_bytes + picture.mask_size_bytes for picture in spec.pictures)


async def receive_pictures(
    messages: AsyncIterator[pb.CreateFineTuneRequest], spec: pb.FineTuneSpec, folder: Path
) -> list[bytes]:
    """Write the pictures and masks of the stream into a staged folder; return the SHA-256 of each, in order.

    Raises InvalidArgument (MESSAGE_OUT_OF_ORDER, UPLOAD_SIZE_MISMATCH, UPLOAD_TOO_LARGE).
    """
    hashes: list[bytes] = []
    for index, picture in enumerate(spec.pictures):
        parts = [_Part(index, False, picture.size_bytes)]
        if picture.mask_size_bytes:
            parts.append(_Part(index, True, picture.mask_size_bytes))
        for part in parts:
            place = JobFolders.staged_mask if part.mask else JobFolders.staged_file
            hashes.append(await _receive(messages, part, place(folder, index).source))
    async for message in messages:
        raise _out_of_order(f"a message with {message.WhichOneof('part') or 'nothing'} follows the last picture")
    return hashes


@dataclass(frozen=True, slots=True)
class _Part:
    """A picture, or its mask, on its way in."""

    index: int
    mask: bool
    expected: int

    @property
    def field(self) -> str:
        return f"pictures[{self.index}].{'mask_size_bytes' if self.mask else 'size_bytes'}"

    @property
    def name(self) -> str:
        return f"{'the mask of ' if self.mask else ''}picture {self.index}"


async def _receive(messages: AsyncIterator[pb.CreateFineTuneRequest], part: _Part, target: Path) -> bytes:
    digest = hashlib.sha256()
    received = 0
    with target.open("xb") as file:
        while received < part.expected:
            data = await _next_chunk(messages, part, received)
            await asyncio.to_thread(file.write, data)
            digest.update(data)
            received += len(data)
    return digest.digest()


async def _next_chunk(messages: AsyncIterator[pb.CreateFineTuneRequest], of: _Part, received: int) -> bytes:
    async for message in messages:
        part = message.WhichOneof("part")
        if part != "chunk":
            raise _out_of_order(f"a message after the first carries {part or 'nothing'}; allowed: a chunk")
        chunk = message.chunk
        if (chunk.index, chunk.mask) != (of.index, of.mask):
            if received and (chunk.index, chunk.mask) in ((of.index, True), (of.index + 1, False)):
                raise _wrong_size(of, f"{received} bytes arrived")
            came = _Part(chunk.index, chunk.mask, 0).name
            raise _out_of_order(f"a chunk of {came} came where {of.name} goes on")
        size = len(chunk.data)
        if not 1 <= size <= MAX_CHUNK:
            reason = Reason.UPLOAD_TOO_LARGE if size else Reason.INVALID_FIELD
            text = f"{size} bytes given; allowed: 1 to {MAX_CHUNK} a message"
            raise InvalidArgument.for_field("chunk.data", text, reason)
        if received + size > of.expected:
            raise _wrong_size(of, f"more than {received + size - 1} bytes arrived")
        return chunk.data
    raise _wrong_size(of, f"the stream ended after {received} bytes")


def _check_spec(spec: pb.FineTuneSpec, limits: LimitSettings) -> None:
    if spec.adapter_id:
        check_id(spec.adapter_id, "adapter_id")
    check_display_name(spec.display_name)
    check_labels(spec.labels)
    check_key(spec.idempotency_key)
    _check_counts(spec)
    if not 1 <= len(spec.pictures) <= limits.max_pictures:
        raise InvalidArgument.for_field("pictures", f"{len(spec.pictures)} given; allowed: 1 to {limits.max_pictures}")
    for index, picture in enumerate(spec.pictures):
        if not 1 <= picture.size_bytes <= limits.max_picture_bytes:
            reason = Reason.PICTURE_TOO_LARGE if picture.size_bytes > 0 else Reason.INVALID_FIELD
            text = f"{picture.size_bytes} given; allowed: 1 to {limits.max_picture_bytes} bytes"
            raise InvalidArgument.for_field(f"pictures[{index}].size_bytes", text, reason)
        if not 0 <= picture.mask_size_bytes <= limits.max_picture_bytes:
            text = f"{picture.mask_size_bytes} given; allowed: 0 (no mask) to {limits.max_picture_bytes} bytes"
            raise InvalidArgument.for_field(f"pictures[{index}].mask_size_bytes", text, Reason.PICTURE_TOO_LARGE)
    total = announced_bytes(spec)
    if total > limits.max_pictures_bytes:
        raise InvalidArgument.for_field(
            "pictures",
            f"{total} bytes given in all; allowed: {limits.max_pictures_bytes}. Send fewer or smaller pictures.",
            Reason.UPLOAD_TOO_LARGE,
        )


def _check_counts(spec: pb.FineTuneSpec) -> None:
    """Refuse lists that are too long before anything goes through them: a message has room for millions of entries."""
    violations = check_count("identifier_init", spec.identifier_init, 0, MAX_INIT_WORDS)
    violations += check_count("sample_prompts", spec.sample_prompts, 0, MAX_SAMPLE_PROMPTS)
    violations += check_count("more_subjects", spec.more_subjects, 0, MAX_SUBJECTS - 1)
    for index, subject in enumerate(spec.more_subjects[:MAX_SUBJECTS]):
        violations += check_count(f"more_subjects[{index}].identifier_init", subject.identifier_init, 0, MAX_INIT_WORDS)
    if violations:
        text = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
        raise InvalidArgument(Reason.INVALID_FIELD, text, violations=violations)


def _out_of_order(what: str) -> InvalidArgument:
    return InvalidArgument(Reason.MESSAGE_OUT_OF_ORDER, f"CreateFineTune: {what}")


def _wrong_size(part: _Part, what: str) -> InvalidArgument:
    return InvalidArgument.for_field(
        part.field,
        f"{part.expected} given, but {what}; they must be equal",
        Reason.UPLOAD_SIZE_MISMATCH,
    )
