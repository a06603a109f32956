"""A double of TensorRT's Python module that runs plans with ONNX Runtime on the CPU and enforces the contract.

A "plan" is the graph with its weights; an "engine" reads and writes the very addresses it is given, so shapes, dtypes,
bindings and refits are checked by numbers. What TensorRT documents as undefined or refused, the double refuses:

- a call before every tensor has a shape and an address, or without scratch memory
- weights of another dtype or count than the prototype; a refit while some are missing
- a refit on another stream than the one with pending work
- shapes outside the profile; a plan of another version
"""

import json
from functools import partial
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from tensorrt_world import (
    TYPES,
    BuilderFlag,
    ContractError,
    DataType,
    ExecutionContextAllocationStrategy,
    ILogger,
    InlineLane,
    IProgressMonitor,
    NetworkDefinitionCreationFlag,
    TensorIOMode,
    TensorLocation,
    Weights,
    World,
    memory_at,
    shape_of,
)

from hueshift.engines.tensorrt_loader import TensorRT, make_logger
from hueshift.engines.tensorrt_setup import TensorRtParts

_MAGIC = b"DOUBLE-PLAN\n"


class _Network:
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.model: Any = None
        self.marked: list[str] = []
        self.num_layers = 0

    @property
    def num_inputs(self) -> int:
        return len(self.model.graph.input)

    def get_input(self, number: int) -> Any:
        value = self.model.graph.input[number]
        return SimpleNamespace(name=value.name, shape=shape_of(value), dtype=TYPES[value.type.tensor_type.elem_type])

    def mark_weights_refittable(self, name: str) -> bool:
        known = any(weight.name == name for weight in self.model.graph.initializer)
        if known:
            self.marked.append(name)
        return known


class _Config:
    def __init__(self, world: World) -> None:
        self.world = world
        self.flags: set[BuilderFlag] = set()
        self.profiles: list[Any] = []
        self.progress_monitor: Any = None
        self.builder_optimization_level = 3
        self.timing: Any = None

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, data: bytes) -> Any:
        self.world.timing_given.append(data)
        return SimpleNamespace(serialize=lambda: b"timed", data=data)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if cache.data not in (b"", b"timed"):
            return False
        self.timing = cache
        return True


def make_tensorrt(world: World) -> TensorRT:
    """The double as the loader would return it."""
    module = make_module(world)
    return TensorRT(module, "tensorrt", world.version, False, make_logger(module))


def make_parts(world: World) -> TensorRtParts:
    """The double, a GPU that does not exist, and a stream that runs at once."""
    return TensorRtParts(make_tensorrt(world), "Imagined GPU", "9.9", InlineLane(world))


def make_module(world: World) -> Any:
    """Module namespace with the names that TensorRT has."""
    return SimpleNamespace(
        __version__=world.version,
        DataType=DataType,
        TensorIOMode=TensorIOMode,
        TensorLocation=TensorLocation,
        BuilderFlag=BuilderFlag,
        NetworkDefinitionCreationFlag=NetworkDefinitionCreationFlag,
        ExecutionContextAllocationStrategy=ExecutionContextAllocationStrategy,
        ILogger=ILogger,
        IProgressMonitor=IProgressMonitor,
        Weights=Weights,
        Builder=partial(FakeBuilder, world),
        OnnxParser=partial(FakeParser, world),
        Runtime=partial(FakeRuntime, world),
        Refitter=partial(FakeRefitter, world),
    )


class FakeBuilder:
    """Builds a "plan": a header and the graph with its weights."""

    def __init__(self, world: World, logger: Any) -> None:
        self.world = world
        world.logger = logger

    def create_network(self, flags: int) -> _Network:
        if not flags & (1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED):
            raise ContractError("TensorRT 10 builds strongly typed networks only when asked")
        return _Network(flags)

    def create_builder_config(self) -> _Config:
        return _Config(self.world)

    def create_optimization_profile(self) -> Any:
        shapes: dict[str, Any] = {}
        return SimpleNamespace(
            shapes=shapes, set_shape=lambda name, low, usual, high: shapes.__setitem__(name, (low, usual, high))
        )

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
        return _build(self.world, network, config)


class FakeParser:
    """Reads the graph with onnx."""

    def __init__(self, world: World, network: _Network, logger: Any) -> None:
        self.world = world
        self.network = network
        self.num_errors = 0

    def parse_from_file(self, path: str) -> bool:
        if self.world.faults.parse:
            self.num_errors = 1
            return False
        self.network.model = onnx.load(path)
        self.network.num_layers = len(self.network.model.graph.node)
        return True

    def get_error(self, number: int) -> Any:
        text = self.world.faults.parse
        return SimpleNamespace(desc=lambda: text, node_name=lambda: "mid_block/Conv_7", node=lambda: 7)


class FakeRuntime:
    """Loads plans of its own version."""

    def __init__(self, world: World, logger: Any) -> None:
        self.world = world
        world.logger = logger

    def deserialize_cuda_engine(self, data: bytes) -> "FakeEngine | None":
        world = self.world
        if world.faults.deserialize:
            world.faults.deserialize -= 1
            world.complain("Serialization assertion failed")
            return None
        header = data[len(_MAGIC) :].split(b"\n", 1)[0] if data.startswith(_MAGIC) else b"{}"
        if json.loads(header).get("version") != world.version:
            world.complain("magicTag or version does not fit")
            return None
        return FakeEngine(world, data)


def _build(world: World, network: _Network, config: _Config) -> bytes | None:
    refit = config.flags & {BuilderFlag.REFIT, BuilderFlag.REFIT_INDIVIDUAL}
    if refit and len(config.profiles) > 1:
        raise ContractError("a refittable engine takes one optimisation profile")
    if network.marked and BuilderFlag.REFIT_INDIVIDUAL not in config.flags:
        raise ContractError("weights are marked refittable without REFIT_INDIVIDUAL")
    monitor = config.progress_monitor
    monitor.phase_start("Build", None, 2)
    monitor.phase_start("Tactics", "Build", 4)
    for step in range(4):
        if not monitor.step_complete("Tactics", step):
            world.complain("the build was cancelled")
            return None
    monitor.phase_finish("Tactics")
    monitor.step_complete("Build", 0)
    monitor.phase_finish("Build")
    if world.faults.memory or world.faults.build:
        world.complain("Cuda error: out of memory" if world.faults.memory else world.faults.build)
        return None
    world.events.append("build" + (" refit" if refit else ""))
    if world.faults.drop_bias and refit:
        for weight in network.model.graph.initializer:
            if weight.name == world.faults.drop_bias:
                weight.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(weight)), weight.name))
    header = {
        "version": world.version,
        "marked": network.marked,
        "profile": {name: [list(shape) for shape in shapes] for name, shapes in config.profiles[0].shapes.items()},
    }
    return _MAGIC + json.dumps(header).encode() + b"\n" + bytes(network.model.SerializeToString())


class FakeEngine:
    """A deserialised plan."""

    device_memory_size_v2 = 4096

    def __init__(self, world: World, data: bytes) -> None:
        head, body = data[len(_MAGIC) :].split(b"\n", 1)
        header = json.loads(head)
        self.world = world
        self.marked: list[str] = header["marked"]
        self.profile: dict[str, list[list[int]]] = header["profile"]
        self.model = onnx.load_from_string(body)
        self.session: Any = None
        self.values = {**{v.name: v for v in self.model.graph.input}, **{v.name: v for v in self.model.graph.output}}
        self.names = list(self.values)
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, number: int) -> str:
        return self.names[number]

    def get_tensor_dtype(self, name: str) -> DataType:
        return TYPES[self.values[name].type.tensor_type.elem_type]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return shape_of(self.values[name])

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        inputs = {value.name for value in self.model.graph.input}
        return TensorIOMode.INPUT if name in inputs else TensorIOMode.OUTPUT

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> "FakeContext":
        if strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            raise ContractError("the double knows contexts with scratch memory of the caller's only")
        self.world.events.append("context")
        return FakeContext(self)

    def initializer(self, name: str) -> Any:
        return next(weight for weight in self.model.graph.initializer if weight.name == name)

    def run(self, feeds: dict[str, Any]) -> Any:
        if self.session is None:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = 1
            # Less work than optimising a graph that runs a few times.
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            data = self.model.SerializeToString()
            self.session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        return self.session.run(None, feeds)[0]


class FakeContext:
    """An execution context that reads and writes the addresses it was given."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = 0

    def set_device_memory(self, address: int, size: int) -> None:
        if address % 256 or size < self.engine.device_memory_size_v2:
            raise ContractError("scratch memory must be aligned to 256 bytes and as large as the engine says")
        self.scratch = address

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.profile[name]
        if any(not a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
            return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.values and address != 0

    def infer_shapes(self) -> list[str]:
        inputs = [value.name for value in self.engine.model.graph.input]
        return [name for name in inputs if name not in self.shapes]

    def execute_async_v3(self, stream: int) -> bool:
        world = self.engine.world
        if stream in (0, None):
            raise ContractError("calls belong on a stream of their own")
        if not self.scratch or set(self.addresses) != set(self.engine.values) or self.infer_shapes():
            raise ContractError("a call before every tensor has a shape and an address")
        if world.capturing is not None:
            world.capturing.append(self.execute)
            world.events.append("captured")
            return True
        if world.faults.calls:
            world.faults.calls -= 1
            world.events.append("call refused")
            return False
        world.events.append("call")
        world.pending[stream] = "call"
        self.execute()
        return True

    def execute(self) -> None:
        inputs = {value.name for value in self.engine.model.graph.input}
        feeds = {name: self._array(name, self.shapes[name]) for name in inputs}
        out = self.engine.run(feeds)
        self._array("out", self.shapes["sample"])[...] = out

    def _array(self, name: str, shape: tuple[int, ...]) -> Any:
        return memory_at(self.addresses[name], self.engine.get_tensor_dtype(name).value, shape)


class FakeRefitter:
    """Takes weights from addresses, at the time of the refit."""

    def __init__(self, world: World, engine: FakeEngine, logger: Any) -> None:
        self.world = world
        self.engine = engine
        self.weights_validation = True
        self.given: dict[str, Weights] = {}
        world.events.append("refitter")

    def get_all_weights(self) -> list[str]:
        return [name for name in self.engine.marked if name not in self.world.faults.missing]

    def get_missing_weights(self) -> list[str]:
        return [name for name in self.engine.marked if name not in self.given] if self.given else []

    def get_weights_prototype(self, name: str) -> Weights:
        weight = self.engine.initializer(name)
        return Weights(TYPES[weight.data_type], 0, prod(weight.dims))

    def set_named_weights(self, name: str, weights: Weights, location: TensorLocation) -> bool:
        prototype = self.get_weights_prototype(name)
        if (weights.dtype, weights.size) != (prototype.dtype, prototype.size):
            raise ContractError(f"{name}: another dtype or count than its prototype")
        if location is not TensorLocation.DEVICE:
            raise ContractError("adapted weights are on the device")
        self.world.events.append("set weights")
        self.given[name] = weights
        return True

    def refit_cuda_engine_async(self, stream: int) -> bool:
        others = {pending for pending in self.world.pending if pending != stream}
        if others:
            raise ContractError(f"a refit while the engine has work on stream {others}")
        if self.get_missing_weights():
            return False
        refused = self.world.faults.refits > 0
        names = list(self.given)
        for name in names[: len(names) // 2] if refused else names:
            weights, target = self.given[name], self.engine.initializer(name)
            values = memory_at(weights.pointer, weights.dtype.value, tuple(target.dims)).copy()
            target.CopyFrom(numpy_helper.from_array(values, name))
        self.engine.session = None
        self.world.events.append("refit refused" if refused else "refit")
        self.world.faults.refits -= refused
        return not refused
