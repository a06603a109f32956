"""Run one TensorRT plan: memory that never moves, one context for each shape, its calls captured in CUDA graphs."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.graph_unet import OUTPUT
from hueshift.engines.tensorrt_build import shape_at
from hueshift.engines.tensorrt_lane import Lane
from hueshift.engines.tensorrt_loader import Fallback, TensorRT, TensorRtError
from hueshift.engines.tensorrt_plans import PlanRanges
from hueshift.engines.transfer import pinned_for

# Shapes in use at once: buckets of the batch times sizes of pictures. A context more costs a capture, not a result.
_MOST_CONTEXTS = 16
_ALIGNMENT = 256
_log = structlog.get_logger()


def load_plan(trt: TensorRT, file: Path) -> Any:
    """Deserialise a plan on the current device. Raises TensorRtError (plan)."""
    trt.forget_errors()
    runtime = trt.module.Runtime(trt.logger)
    engine = runtime.deserialize_cuda_engine(file.read_bytes())
    if engine is None:
        raise TensorRtError(
            Fallback.PLAN,
            f"{trt.name} {trt.version} cannot load {file.parent.name} ({trt.errors()}); `hueshift engine prune --all` "
            "removes the plans, and the next start builds them again",
        )
    return engine


class Scratch:
    """Working memory shared by the contexts of several plans: they run after each other, on one lane."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self._memory = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, device=device)

    @property
    def address(self) -> int:
        """Its first address that TensorRT takes."""
        return -(-self._memory.data_ptr() // _ALIGNMENT) * _ALIGNMENT


@dataclass(slots=True)
class _Shape:
    """A context at one shape, and its captured call."""

    context: Any
    views: dict[str, Tensor]
    replay: Callable[[], None] | None = None


class PlanRunner:
    """Calls one plan. `slabs` are read where they lie; all else is copied into buffers of the largest shape."""

    def __init__(
        self,
        trt: TensorRT,
        engine: Any,
        ranges: PlanRanges,
        slabs: Mapping[str, Tensor],
        lane: Lane,
        scratch: Scratch,
        *,
        cuda_graphs: bool,
    ) -> None:
        self._trt = trt
        self._engine = engine
        self._ranges = ranges
        self._lane = lane
        self._scratch = scratch
        self._cuda_graphs = cuda_graphs
        self._captures = cuda_graphs and not trt.has_own_graphs
        self._shapes: OrderedDict[tuple[int, int, int], _Shape] = OrderedDict()
        self._inputs, dtypes = self._read_tensors()
        self._slabs = {name: slab for name, slab in slabs.items() if name in self._inputs}
        shapes = {name: shape_at(name, tuple(engine.get_tensor_shape(name)), ranges, 2) for name in dtypes}
        self._buffers = {
            name: torch.zeros(prod(shapes[name]), dtype=dtype, device=lane.device)
            for name, dtype in dtypes.items()
            if name not in self._slabs
        }
        self._cross_shape = shapes["cross"][1:]
        self._added_width = shapes["added"][1] if "added" in shapes else 0
        self._channels = shapes["sample"][1]

    def run(
        self,
        sample: Tensor,
        timestep: Tensor,
        cross: Tensor,
        adapter_index: Tensor,
        added: Tensor | None = None,
    ) -> Tensor:
        """Run the plan on N rows; shapes as in onnx_export. Returns out [N, 4, h, w] fp32 on the lane's device.

        The batch is filled up to a bucket with rows of the base: a few shapes serve every batch. Raises InvalidArgument
        on a size outside the profile, TensorRtError (run) if TensorRT refuses a call.
        """
        rows, _, height, width = sample.shape
        self._check_sides(height, width)
        given = {"sample": sample, "timestep": timestep, "cross": cross, "adapter_index": adapter_index}
        if "added" in self._buffers:
            if added is None:
                raise InvalidArgument.for_field("added", "absent; an SDXL plan reads it")
            given["added"] = added
        with self._lane.running():
            shape = self._shape(bucket_of(rows, self._ranges.max_batch), height, width)
            for name, values in given.items():
                if name in shape.views:
                    shape.views[name][:rows].copy_(pinned_for(values, self._lane.device), non_blocking=True)
            if "adapter_index" in shape.views:
                shape.views["adapter_index"][rows:].zero_()
            if shape.replay is not None:
                shape.replay()
            else:
                self._call(shape)
                # The first call of a shape sets things up that cannot be captured, so the second is.
                shape.replay = self._captured(shape)
            return shape.views[OUTPUT][:rows].float()

    def forget_captures(self) -> None:
        """Capture anew at the next call: whether a captured call survives a refit is not documented."""
        for shape in self._shapes.values():
            shape.replay = None

    def _call(self, shape: _Shape) -> None:
        if not shape.context.execute_async_v3(self._lane.handle):
            raise TensorRtError(Fallback.RUN, f"TensorRT refused a call: {self._trt.errors()}")

    def _captured(self, shape: _Shape) -> Callable[[], None] | None:
        if not self._captures:
            return None
        try:
            return self._lane.capture(lambda: self._call(shape))
        except (RuntimeError, TensorRtError) as error:
            _log.warning("cuda_graph_refused", engine="tensorrt", error=str(error).splitlines()[0])
            self._captures = False
            return None

    def _shape(self, batch: int, height: int, width: int) -> _Shape:
        key = (batch, height, width)
        if key not in self._shapes:
            if len(self._shapes) >= _MOST_CONTEXTS:
                # Its memory must not go while its last call runs.
                self._lane.wait()
                self._shapes.popitem(last=False)
            self._shapes[key] = self._make_shape(*key)
        self._shapes.move_to_end(key)
        return self._shapes[key]

    def _make_shape(self, batch: int, height: int, width: int) -> _Shape:
        # A captured call keeps the state of its context: every shape has one of its own.
        context = self._trt.create_context(self._engine, cuda_graphs=self._cuda_graphs)
        if context is None:
            raise TensorRtError(Fallback.MEMORY, f"TensorRT made no context: {self._trt.errors()}")
        self._trt.give_memory(context, self._scratch.address, self._scratch.size)
        picture = (batch, self._channels, height, width)
        shapes = {
            "sample": picture,
            "timestep": (batch,),
            "cross": (batch, *self._cross_shape),
            "adapter_index": (batch,),
            "added": (batch, self._added_width),
            OUTPUT: picture,
        }
        views = {name: buffer[: prod(shapes[name])].view(shapes[name]) for name, buffer in self._buffers.items()}
        for name, tensor in {**views, **self._slabs}.items():
            shaped = name not in self._inputs or context.set_input_shape(name, tuple(tensor.shape))
            if not (shaped and context.set_tensor_address(name, tensor.data_ptr())):
                raise TensorRtError(
                    Fallback.RUN, f"TensorRT refused {name} {tuple(tensor.shape)}: {self._trt.errors()}"
                )
        unknown = context.infer_shapes()
        if unknown:
            raise TensorRtError(Fallback.PLAN, f"the plan wants tensors that nobody gives: {', '.join(unknown)}")
        return _Shape(context, views)

    def _read_tensors(self) -> tuple[set[str], dict[str, torch.dtype]]:
        """Names of the inputs, and dtypes of all tensors, of the plan."""
        engine, mode = self._engine, self._trt.module.TensorIOMode
        ours = {theirs: dtype for dtype, theirs in self._trt.dtypes.items()}
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        known = {"sample", "timestep", "cross", "added", "adapter_index", "spectral_slab", "lowrank_slab", OUTPUT}
        odd = [name for name in names if name not in known or engine.get_tensor_dtype(name) not in ours]
        if odd or not {"sample", "timestep", "cross", OUTPUT} <= set(names):
            raise TensorRtError(Fallback.PLAN, f"the plan has other tensors than its graph: {', '.join(names)}")
        inputs = {name for name in names if engine.get_tensor_mode(name) == mode.INPUT}
        return inputs, {name: ours[engine.get_tensor_dtype(name)] for name in names}

    def _check_sides(self, height: int, width: int) -> None:
        low, _, high = self._ranges.sides
        if not (low <= height <= high and low <= width <= high):
            raise InvalidArgument.for_field(
                "latents", f"{height}x{width} is outside this engine's profile, {low} to {high} a side"
            )


def buckets_up_to(largest: int) -> tuple[int, ...]:
    """Rows that calls of at most `largest` are filled up to."""
    return tuple(sorted({bucket_of(rows, largest) for rows in range(1, largest + 1)}))


def bucket_of(rows: int, largest: int) -> int:
    """The next power of two, at most `largest`."""
    return min(1 << max(0, rows - 1).bit_length(), largest)
