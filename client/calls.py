"""Calls as data: which RPC, what is sent, how the answer is read. Both clients run the same ones."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc

from hueshift.v1.adapters_pb2_grpc import AdapterServiceStub
from hueshift.v1.finetune_pb2_grpc import FineTuneServiceStub
from hueshift.v1.generation_pb2_grpc import GenerationServiceStub
from hueshift.v1.model_pb2_grpc import ModelServiceStub

Q = TypeVar("Q")
R = TypeVar("R")
T = TypeVar("T")

UNARY_SECONDS = 30.0
UPLOAD_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class CallTimes:
    """Seconds of a call over all its attempts. `files`: of those that carry pictures or adapter files, `unary`: of all
    others but Generate and watches. Raises ValueError unless both are above 0 and finite.
    """

    unary: float = UNARY_SECONDS
    files: float = UPLOAD_SECONDS

    def __post_init__(self) -> None:
        """Check both."""
        for name, seconds in (("timeout", self.unary), ("file_timeout", self.files)):
            if not 0 < seconds < float("inf"):
                raise ValueError(f"{name} {seconds!r} given; allowed: seconds above 0")


class Stubs:
    """The generated stubs of every service on one channel.

    The generated code works on a sync and on an asyncio channel alike; the types are those of the sync one.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self.generation = GenerationServiceStub(channel)
        self.adapters = AdapterServiceStub(channel)
        self.finetune = FineTuneServiceStub(channel)
        self.model = ModelServiceStub(channel)


@dataclass(frozen=True, slots=True)
class Unary(Generic[Q, R, T]):
    """One request, one answer."""

    method: "Callable[[Stubs], grpc.UnaryUnaryMultiCallable[Q, R]]"
    request: Q
    decode: Callable[[R], T]


@dataclass(frozen=True, slots=True)
class Upload(Generic[Q, R, T]):
    """Many messages, one answer. `messages` begins again for every attempt."""

    method: "Callable[[Stubs], grpc.StreamUnaryMultiCallable[Q, R]]"
    messages: Callable[[], Iterator[Q]]
    decode: Callable[[R], T]


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list."""

    items: tuple[T, ...]
    next_token: str


Paged = Callable[[str], Unary[Any, Any, Page[T]]]
"""A list: given a page token (empty for the first), the call for that page."""
