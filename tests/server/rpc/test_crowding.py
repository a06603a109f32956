"""Messages of too many values: refused unread, whatever they look like, and nothing else is."""

from random import Random
from typing import Any

import pytest
from google.protobuf.message import DecodeError, Message
from random_messages import damage, random_message

from hueshift.server.rpc.crowding import MAX_VALUES, CrowdedMessage, counted, shape_of
from hueshift.v1 import adapters_pb2, finetune_pb2, generation_pb2


def parse(kind: type[Message], data: bytes) -> Message:
    """Parse as the server does."""
    parsed: Message = counted(kind.FromString, shape_of(kind.DESCRIPTOR))(data)
    return parsed


def labels(count: int) -> dict[str, str]:
    return {f"label-{number}": "" for number in range(count)}


def test_as_many_values_as_are_allowed_are_read() -> None:
    request = adapters_pb2.ListAdaptersRequest(labels=labels(MAX_VALUES))
    assert parse(adapters_pb2.ListAdaptersRequest, request.SerializeToString()) == request


def test_numbers_in_one_piece_are_one_value() -> None:
    request = generation_pb2.GenerateRequest(prompt="a fox", seeds=range(100_000))
    assert parse(generation_pb2.GenerateRequest, request.SerializeToString()) == request


@pytest.mark.parametrize(
    ("request_", "path"),
    [
        (adapters_pb2.ListAdaptersRequest(labels=labels(MAX_VALUES + 1)), "labels"),
        (adapters_pb2.ListAdaptersRequest(page_size=1, labels=labels(MAX_VALUES)), "labels"),
        (
            adapters_pb2.ImportAdapterRequest(spec=adapters_pb2.ImportAdapterSpec(labels=labels(MAX_VALUES))),
            "spec.labels",
        ),
        (
            generation_pb2.GenerateRequest(
                regions=[
                    generation_pb2.Region(
                        adapters=[generation_pb2.AdapterUse(block_weights=dict.fromkeys(labels(7_000), 1.0))]
                    )
                ]
                * 3
            ),
            "regions.adapters.block_weights",
        ),
        (finetune_pb2.FineTuneSpec(identifier_init=["x"] * (MAX_VALUES + 1)), "identifier_init"),
    ],
)
def test_one_more_is_refused_unread_and_named(request_: Message, path: str) -> None:
    def read(data: bytes) -> Message:
        raise AssertionError("protobuf was given the message")

    with pytest.raises(CrowdedMessage) as caught:
        counted(read, shape_of(request_.DESCRIPTOR))(request_.SerializeToString())
    assert caught.value.field == path


@pytest.mark.parametrize(
    "before",
    [
        b"",
        # An unknown group, which protobuf skips: in it, labels that are cut short.
        b"\xfb\x3e\x1a\x03\x0a\x05\x61\xfc\x3e",
        # Unknown fields of every kind, and a page size written with more bytes than it needs.
        b"\xf8\x3e\x01\xf9\x3e12345678\xfd\x3e1234\xfa\x3e\x02ab\x88\x80\x00\x81\x80\x00",
    ],
)
def test_nothing_before_them_hides_values(before: bytes) -> None:
    kind = adapters_pb2.ListAdaptersRequest
    data = before + kind(labels=labels(MAX_VALUES + 1)).SerializeToString()
    assert len(kind.FromString(data).labels) == MAX_VALUES + 1
    with pytest.raises(CrowdedMessage):
        parse(kind, data)


def test_what_protobuf_refuses_it_still_refuses_and_what_it_reads_is_read() -> None:
    random = Random(7)
    kinds: tuple[type[Message], ...] = (generation_pb2.GenerateRequest, finetune_pb2.CreateFineTuneRequest)
    refused = 0
    for number in range(200):
        kind = kinds[number % 2]
        # Long enough to be walked through.
        described: Any = kind.DESCRIPTOR
        data = random_message(random, described).SerializeToString() + b"\xfa\x3e\xc0\xb8\x02" + b"\xff" * 40_000
        data = damage(random, data) if number % 3 else data
        try:
            expected = kind.FromString(data)
        except DecodeError:
            refused += 1
            with pytest.raises(DecodeError):
                parse(kind, data)
        else:
            # By bytes: values that are not numbers equal nothing.
            assert parse(kind, data).SerializeToString(deterministic=True) == expected.SerializeToString(
                deterministic=True
            )
    assert 20 < refused < 180


def test_a_front_end_is_given_the_bytes_as_they_are() -> None:
    shape = shape_of(adapters_pb2.ListAdaptersRequest.DESCRIPTOR)
    data = adapters_pb2.ListAdaptersRequest(labels=labels(10_000)).SerializeToString()
    assert counted(None, shape)(data) is data
