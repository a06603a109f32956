"""Random and damaged input: protobuf messages by their descriptors, and bytes with a few things wrong."""

import math
from random import Random
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

_INTEGERS = (0, 1, 2, 3, 4, 7, 16, 64, 128, 1000, -1, -(2**31), 2**31 - 1, 2**63 - 1, -(2**63), 2**64 - 1)
_FLOATS = (0.0, 1.0, 0.5, -1.0, 5.0, 1e-9, 3e38, -3e38, math.nan, math.inf, -math.inf)
_WORDS = (
    "",
    "a fox",
    "fox",
    "tenants/acme/adapters/fox",
    "tenants/rival/adapters/fox",
    "tenants/acme/fineTunes/job-000000000000000000000000",
    "models/emoji-128",
    "../../etc/passwd",
    "a" * 64,
    "é漢\U0001f98a\u202e",
    "\x00",
    "%s{0}$(id)",
    "WzEuMCwgImEiXQ==",
    "W05hTiwgMF0=",
    "sks",
    "animal",
    "structure",
    "mid_block",
    "' OR 1=1 --",
    "x" * 5000,
)
_DEPTH = 3


def random_message(random: Random, descriptor: Descriptor, depth: int = 0) -> Message:
    """A message of that type: each field is absent, plausible or extreme."""
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if random.random() < 0.4 or (field.message_type is not None and depth >= _DEPTH):
            continue
        _fill(random, message, field, depth)
    return message


def _fill(random: Random, message: Message, field: FieldDescriptor, depth: int) -> None:
    target: Any = getattr(message, field.name)
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        for _ in range(random.choice((0, 1, 2, 20))):
            target[random.choice(_WORDS)] = _value(random, kind.fields_by_name["value"])
    elif kind is not None and field.is_repeated:
        for _ in range(random.choice((0, 1, 2, 6))):
            target.add().CopyFrom(random_message(random, kind, depth + 1))
    elif kind is not None:
        target.CopyFrom(random_message(random, kind, depth + 1))
    elif field.is_repeated:
        target.extend(_value(random, field) for _ in range(random.choice((0, 1, 2, 6))))
    else:
        setattr(message, field.name, _value(random, field))


def _value(random: Random, field: FieldDescriptor) -> Any:
    kinds = FieldDescriptor
    if field.type == kinds.TYPE_STRING:
        return random.choice(_WORDS)
    if field.type == kinds.TYPE_BYTES:
        return random.randbytes(random.choice((0, 1, 8, 1000)))
    if field.type == kinds.TYPE_BOOL:
        return random.random() < 0.5
    if field.type in (kinds.TYPE_FLOAT, kinds.TYPE_DOUBLE):
        return random.choice(_FLOATS)
    low, high = {
        kinds.TYPE_UINT64: (0, 2**64 - 1),
        kinds.TYPE_INT64: (-(2**63), 2**63 - 1),
    }.get(field.type, (-(2**31), 2**31 - 1))
    return min(max(random.choice(_INTEGERS), low), high)


def damage(random: Random, data: bytes) -> bytes:
    """The same bytes with one to four things wrong: bits, lost or doubled pieces, junk, a cut."""
    wrong = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(wrong) + 1)
        choice = random.randrange(5)
        if choice == 0 and at < len(wrong):
            wrong[at] ^= 1 << random.randrange(8)
        elif choice == 1:
            wrong[at : at + random.randint(1, 64)] = b""
        elif choice == 2:
            wrong[at:at] = wrong[at : at + random.randint(1, 64)]
        elif choice == 3:
            wrong[at:at] = random.randbytes(random.randint(1, 16))
        else:
            del wrong[at:]
    return bytes(wrong)
