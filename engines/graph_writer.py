"""Build an ONNX graph node by node: operators, named weights, constants. It knows nothing of UNets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

OPSET = 18
GRAPH_FILE = "graph.onnx"
WEIGHTS_FILE = "graph.onnx.data"
# onnx asks readers to align external tensors so that they can be mapped into memory.
_ALIGNMENT = 64
_TYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.int64: TensorProto.INT64}


class GraphWriter:
    """A graph in the making. Values are named by strings; every operator returns the name of its result.

    `scope` is the module that the nodes to come belong to; it begins their names, so that profiles and error messages
    of any runtime point at a layer of the UNet.
    """

    def __init__(self) -> None:
        self.scope = ""
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, tuple[Tensor, torch.dtype]] = {}
        self._constants: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> str:
        """Declare an input; names in `shape` are dynamic dimensions."""
        self._inputs.append(helper.make_tensor_value_info(name, _TYPES[dtype], shape))
        return name

    def output(self, name: str, value: str, dtype: torch.dtype, shape: Sequence[int | str]) -> None:
        """Declare `value` as an output."""
        self._nodes.append(helper.make_node("Identity", [value], [name], name=name))
        self._outputs.append(helper.make_tensor_value_info(name, _TYPES[dtype], shape))

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add an operator with one result."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, results: int, *inputs: str, **attributes: Any) -> list[str]:
        """Add an operator with several results."""
        name = f"{self.scope}/{kind}_{len(self._nodes)}"
        outputs = [name if results == 1 else f"{name}:{i}" for i in range(results)]
        self._nodes.append(helper.make_node(kind, list(inputs), outputs, name=name, **attributes))
        return outputs

    def weight(self, name: str, tensor: Tensor, dtype: torch.dtype) -> str:
        """A parameter under a name of its own, to be stored in `dtype`; giving it again is harmless.

        It is converted, transposed and brought to the CPU while it is written, one at a time: SDXL's 5.1 GB are never
        in memory twice.
        """
        self._weights.setdefault(name, (tensor.detach(), dtype))
        return name

    def integers(self, *values: int) -> str:
        """A constant vector of int64."""
        return self._constant(f"integers{list(values)}", torch.int64, [len(values)], values)

    def number(self, value: float, dtype: torch.dtype) -> str:
        """A constant scalar."""
        return self._constant(f"{dtype}({value!r})".removeprefix("torch."), dtype, [], [value])

    def numbers(self, *values: float) -> str:
        """A constant vector of fp32."""
        return self._constant(f"numbers{list(values)}", torch.float32, [len(values)], values)

    def repeated(self, value: float, size: int, dtype: torch.dtype) -> str:
        """A constant vector of one value, where an operator insists on a scale or bias."""
        name = f"{dtype}({value!r})[{size}]".removeprefix("torch.")
        return self._constant(name, dtype, [size], [value] * size)

    def cast(self, value: str, dtype: torch.dtype) -> str:
        """Convert to another dtype."""
        return self.op("Cast", value, to=_TYPES[dtype])

    def reshape(self, value: str, *shape: int) -> str:
        """Reshape; 0 keeps a dimension, -1 is what remains."""
        return self.op("Reshape", value, self.integers(*shape))

    def _constant(self, name: str, dtype: torch.dtype, shape: list[int], values: Sequence[float]) -> str:
        # In the graph itself: readers need shapes and scales before they look at any file beside it.
        if name not in self._constants:
            self._constants[name] = helper.make_tensor(name, _TYPES[dtype], shape, values)
        return name

    def save(self, folder: Path) -> None:
        """Write GRAPH_FILE and, beside it, WEIGHTS_FILE with the weights.

        Weights lie outside the graph for every size: runtimes map that file, and a graph may pass protobuf's 2 GiB.
        """
        with (folder / WEIGHTS_FILE).open("wb") as data:
            initializers = [_append(data, name, *weight) for name, weight in self._weights.items()]
        graph = helper.make_graph(
            self._nodes, "unet", self._inputs, self._outputs, [*initializers, *self._constants.values()]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="hueshift")
        # The oldest format that holds opset 18, for the sake of older runtimes.
        model.ir_version = 8
        (folder / GRAPH_FILE).write_bytes(model.SerializeToString())


def _append(data: BinaryIO, name: str, tensor: Tensor, dtype: torch.dtype) -> onnx.TensorProto:
    data.write(b"\0" * (-data.tell() % _ALIGNMENT))
    offset = data.tell()
    values = tensor.to("cpu", dtype).contiguous()
    data.write(values.flatten().view(torch.uint8).numpy().data)
    proto = TensorProto(name=name, data_type=_TYPES[dtype], dims=values.shape)
    proto.data_location = TensorProto.EXTERNAL
    # Decimal text in the file, so offsets beyond 2 and 4 GiB are as good as any.
    for key, value in (("location", WEIGHTS_FILE), ("offset", offset), ("length", values.nbytes)):
        proto.external_data.add(key=key, value=str(value))
    return proto
