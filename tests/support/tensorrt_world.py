"""The names and records of the TensorRT double: its enumerations, what shall fail in it, and what has happened."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from math import prod
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from recording_lane import ManualMark


class ContractError(AssertionError):
    """The code under test did what TensorRT forbids."""


class DataType(Enum):
    FLOAT = np.dtype(np.float32)
    HALF = np.dtype(np.float16)
    INT64 = np.dtype(np.int64)


TYPES: dict[int, DataType] = {
    TensorProto.FLOAT: DataType.FLOAT,
    TensorProto.FLOAT16: DataType.HALF,
    TensorProto.INT64: DataType.INT64,
}


class TensorIOMode(Enum):
    INPUT = 1
    OUTPUT = 2


class TensorLocation(Enum):
    DEVICE = 0
    HOST = 1


class BuilderFlag(IntEnum):
    REFIT = 2
    REFIT_INDIVIDUAL = 16


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


class ExecutionContextAllocationStrategy(Enum):
    STATIC = 0
    USER_MANAGED = 2


class ILogger:
    ERROR, WARNING, INFO, INTERNAL_ERROR, VERBOSE = "error", "warning", "info", "internal", "verbose"

    def __init__(self) -> None:
        self.made = True


class IProgressMonitor:
    def __init__(self) -> None:
        self.made = True


@dataclass
class Faults:
    """Failures to play. Each names the call that fails; `refits` counts down refits that are refused."""

    parse: str = ""
    build: str = ""
    memory: bool = False
    refits: int = 0
    calls: int = 0
    drop_bias: str = ""
    missing: tuple[str, ...] = ()
    deserialize: int = 0


@dataclass
class World:
    """What happened, what shall fail, and which work is pending on which stream."""

    version: str = "10.16.1"
    faults: Faults = field(default_factory=Faults)
    events: list[str] = field(default_factory=list)
    pending: dict[int, str] = field(default_factory=dict)
    capturing: list[Callable[[], None]] | None = None
    timing_given: list[bytes] = field(default_factory=list)
    logger: Any = None

    def complain(self, text: str) -> None:
        """Log an error, as TensorRT does."""
        self.logger.log(ILogger.ERROR, text)

    def count(self, event: str) -> int:
        return sum(entry.startswith(event) for entry in self.events)


@dataclass(frozen=True)
class Weights:
    dtype: DataType
    pointer: int = 0
    size: int = 0


def shape_of(value: Any) -> tuple[int, ...]:
    return tuple(-1 if dim.dim_param else dim.dim_value for dim in value.type.tensor_type.shape.dim)


def memory_at(address: int, dtype: Any, shape: tuple[int, ...]) -> Any:
    size = prod(shape) * dtype.itemsize
    buffer = (ctypes.c_char * size).from_address(address)
    return np.frombuffer(buffer, dtype=dtype).reshape(shape)


class InlineLane:
    """A stream that runs at once, on the CPU. Captured calls are recorded by the double and replayed."""

    device = torch.device("cpu")
    handle = 4242

    def __init__(self, world: World) -> None:
        self.world = world
        self.passing = True
        self.marks: list[ManualMark] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        yield

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        recorded: list[Callable[[], None]] = []
        self.world.capturing = recorded
        try:
            work()
        finally:
            self.world.capturing = None

        def replay() -> None:
            self.world.events.append("replay")
            for call in recorded:
                call()

        return replay

    def mark(self) -> ManualMark:
        self.marks.append(ManualMark(passed=self.passing))
        return self.marks[-1]

    def wait(self) -> None:
        self.world.pending.clear()
