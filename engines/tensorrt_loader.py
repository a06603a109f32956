"""TensorRT and TensorRT-RTX behind one object. Everything in which their versions differ is in this file.

Neither is ever imported unless an operator asks for the engine: `load_tensorrt` is the only import of it.
"""

import importlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from types import ModuleType
from typing import Any

import structlog
import torch

from hueshift.adapters.errors import FailedPrecondition, Reason

MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
"""Import names, in the order they are tried; the last is what the wheels of TensorRT-RTX install."""
_OLDEST = 10
_COMPLAINTS = 8
_log = structlog.get_logger()


class Fallback(StrEnum):
    """Why TensorRT does not serve; bounded, used as a metric label."""

    MISSING = "missing"
    """No TensorRT of a known version is installed."""
    DEVICE = "device"
    """The engine runs on no CUDA device."""
    EXPORT = "export"
    """The base model cannot be written as a graph."""
    PARSE = "parse"
    """TensorRT refused the graph."""
    MEMORY = "memory"
    """The GPU's memory was too small to build or to run."""
    BUILD = "build"
    """The build failed otherwise."""
    PLAN = "plan"
    """A plan file could not be loaded."""
    PARITY = "parity"
    """Its output differs from torch's."""
    REFIT = "refit"
    """New weights were refused."""
    RUN = "run"
    """A call failed."""


class TensorRtError(FailedPrecondition):
    """TensorRT cannot serve, with the `fallback` reason for the metric (ENGINE_UNAVAILABLE or ENGINE_PARITY)."""

    def __init__(self, fallback: Fallback, message: str, reason: Reason = Reason.ENGINE_UNAVAILABLE) -> None:
        super().__init__(reason, message, metadata={"fallback": fallback.value})
        self.fallback = fallback


@dataclass(frozen=True)
class TensorRT:
    """The imported module with its differences smoothed. `logger` must outlive everything made with it."""

    module: Any
    name: str
    version: str
    is_rtx: bool
    logger: Any

    def errors(self) -> str:
        """What TensorRT last complained of. Its error recorder would tell too, but one written in Python crashes RTX
        1.7.1 when it is released (seen 2026-11-20)."""
        return "; ".join(self.logger.complaints) or "no error was given"

    def forget_errors(self) -> None:
        """Begin a new list of complaints."""
        self.logger.complaints.clear()

    @property
    def dtypes(self) -> dict[torch.dtype, Any]:
        """TensorRT's names of the dtypes that graphs have."""
        kinds = self.module.DataType
        return {torch.float32: kinds.FLOAT, torch.float16: kinds.HALF, torch.int64: kinds.INT64}

    def create_network(self, builder: Any) -> Any:
        """Return an empty strongly typed network. TensorRT 10 wants the flag, 11 and RTX know nothing else."""
        flags = getattr(self.module, "NetworkDefinitionCreationFlag", None)
        strong = getattr(flags, "STRONGLY_TYPED", None)
        return builder.create_network(0 if strong is None or self.major >= 11 or self.is_rtx else 1 << int(strong))

    @property
    def major(self) -> int:
        """First number of the version."""
        return int(self.version.split(".")[0])

    @property
    def has_timing_cache(self) -> bool:
        """False for RTX, which compiles at the first run and ignores the cache."""
        return not self.is_rtx

    @property
    def has_own_graphs(self) -> bool:
        """True where the library captures CUDA graphs itself (RTX); capturing it from outside then gains nothing."""
        return self.is_rtx and hasattr(self.module, "CudaGraphStrategy")

    def create_context(self, engine: Any, *, cuda_graphs: bool) -> Any:
        """Return an execution context whose scratch memory the caller gives by `give_memory`; None if it failed."""
        strategy = self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.has_own_graphs:
            return engine.create_execution_context(strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        kinds = self.module.CudaGraphStrategy
        config.cuda_graph_strategy = kinds.WHOLE_GRAPH_CAPTURE if cuda_graphs else kinds.DISABLED
        return engine.create_execution_context(config)

    def memory_size(self, engine: Any) -> int:
        """Bytes of scratch memory that any context of `engine` needs. The old name went with TensorRT 11."""
        size = getattr(engine, "device_memory_size_v2", None)
        return int(engine.device_memory_size if size is None else size)

    def give_memory(self, context: Any, address: int, size: int) -> None:
        """Give a context its scratch memory. TensorRT 10.0 has a property only."""
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(address, size)
        else:
            context.device_memory = address


def load_tensorrt(import_module: Callable[[str], ModuleType] = importlib.import_module) -> TensorRT:
    """Import the first TensorRT there is. Raises TensorRtError (missing) saying what was found."""
    found: list[str] = []
    for name in MODULES:
        try:
            module: Any = import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] != name:
                found.append(f"{name} lacks {error.name}")
            continue
        except (ImportError, OSError, RuntimeError) as error:
            # Its libraries are loaded at import and may not fit the driver.
            found.append(f"{name} cannot be imported ({error})")
            continue
        version = str(module.__version__)
        is_rtx = name.startswith("tensorrt_rtx")
        if not is_rtx and int(version.split(".")[0]) < _OLDEST:
            found.append(f"{name} {version} is older than {_OLDEST}")
            continue
        return TensorRT(module, "tensorrt_rtx" if is_rtx else name, version, is_rtx, make_logger(module))
    raise TensorRtError(
        Fallback.MISSING,
        f"engine.kind is tensorrt, but {'; '.join(found) or 'no TensorRT is installed'}; install the extra "
        f"`hueshift[tensorrt]` (tensorrt {_OLDEST} or newer), or set engine.kind to torch",
    )


def make_logger(module: Any) -> Any:
    """Return a logger of TensorRT that writes to ours: its informational lines count as debug."""

    class _Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.complaints: deque[str] = deque(maxlen=_COMPLAINTS)

        def log(self, severity: Any, msg: str) -> None:
            grades = module.ILogger
            if severity in (grades.INTERNAL_ERROR, grades.ERROR):
                self.complaints.append(msg)
                _log.error("tensorrt_says", text=msg)
            elif severity == grades.WARNING:
                _log.warning("tensorrt_says", text=msg)
            elif severity == grades.INFO:
                _log.debug("tensorrt_says", text=msg)

    return _Logger()
