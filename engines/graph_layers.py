"""The adapted layers as ONNX nodes: what engines/adapted_layers.py does in torch, written into a graph.

Parameters keep their module's name: `<layer>.weight`, or `<layer>.u` and `<layer>.vh` under the factored plan. Matrices
that MatMul reads the other way round are stored so, as `<name>.transposed`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hueshift.engines.adapted_layers import transformer_of
from hueshift.engines.graph_writer import GraphWriter
from hueshift.engines.interface import Plan
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors


class GraphLayers:
    """Writes linear, convolution and norm layers of one UNet under one plan; `names` are the modules' own.

    `written` collects the names, so that the caller can tell that none was forgotten. `masks` holds the LAG mask
    [batch, positions] of each transformer, as far as the graph is written; branches to come in it are confined to it.
    """

    def __init__(
        self, graph: GraphWriter, rows: RowLayout, factors: SpectralFactors, plan: Plan, dtype: torch.dtype
    ) -> None:
        self.graph = graph
        self.written: set[str] = set()
        self.masks: dict[str, str] = {}
        self._factors = factors
        self._plan = plan
        self._dtype = dtype
        self._values: Mapping[str, str] = {}
        self._branches: Mapping[str, tuple[str, str]] = {}
        self._read_rows(rows)

    def linear(self, name: str, layer: nn.Linear, x: str, dims: int = 3) -> str:
        """[batch, ..., cols] of `dims` dimensions to [batch, ..., rows]."""
        graph = self._enter(name)
        if self._plan is Plan.DENSE:
            out = graph.op("MatMul", x, self._transposed(f"{name}.weight", layer.weight))
        else:
            hidden = graph.op("MatMul", x, self._transposed(f"{name}.vh", self._factors.vh[name]))
            hidden = self._scale(hidden, name, list(range(1, dims - 1)))
            out = graph.op("MatMul", hidden, self._transposed(f"{name}.u", self._factors.u[name]))
        if layer.bias is not None:
            out = graph.op("Add", out, self._parameter(f"{name}.bias", layer.bias))
        branch = self._branches.get(name)
        if branch is None:
            return out
        tokens = x if dims == 3 else graph.op("Unsqueeze", x, graph.integers(1))
        a, b = (graph.op("Transpose", part, perm=[0, 2, 1]) for part in branch)
        product = self._confined(name, graph.op("MatMul", graph.op("MatMul", tokens, a), b), axis=2)
        product = product if dims == 3 else graph.op("Squeeze", product, graph.integers(1))
        return graph.op("Add", out, product)

    def conv(self, name: str, layer: nn.Conv2d, x: str) -> str:
        """[batch, c_in, h, w] to [batch, c_out, h', w']."""
        graph = self._enter(name)
        geometry = {
            "kernel_shape": list(layer.kernel_size),
            "strides": list(layer.stride),
            "dilations": list(layer.dilation),
            "pads": [int(p) for p in layer.padding] * 2,
        }
        bias = [] if layer.bias is None else [self._parameter(f"{name}.bias", layer.bias)]
        if self._plan is Plan.DENSE:
            out = graph.op("Conv", x, self._parameter(f"{name}.weight", layer.weight), *bias, **geometry)
        else:
            filters = self._factors.vh[name].reshape(-1, *layer.weight.shape[1:])
            hidden = graph.op("Conv", x, self._parameter(f"{name}.vh", filters), **geometry)
            hidden = self._scale(hidden, name, [2, 3])
            u = self._factors.u[name][:, :, None, None]
            out = graph.op("Conv", hidden, self._parameter(f"{name}.u", u), *bias, kernel_shape=[1, 1])
        branch = self._branches.get(name)
        if branch is None:
            return out
        pixels = graph.reshape(x, 0, layer.in_channels, -1)
        product = graph.op("MatMul", branch[1], graph.op("MatMul", branch[0], pixels))
        product = self._confined(name, product, axis=1)
        return graph.op("Add", out, graph.op("Reshape", product, graph.op("Shape", out)))

    def group_norm(self, name: str, layer: nn.GroupNorm, x: str) -> str:
        """Group norm of [batch, channels, h, w]: an instance norm of the groups, then the weights."""
        graph = self._enter(name)
        groups = layer.num_groups
        ones, zeros = (graph.repeated(value, groups, self._dtype) for value in (1.0, 0.0))
        grouped = graph.reshape(x, 0, groups, -1)
        normal = graph.op("InstanceNormalization", grouped, ones, zeros, epsilon=layer.eps)
        normal = graph.op("Reshape", normal, graph.op("Shape", x))
        if self._plan is Plan.DENSE:
            normal = graph.op("Mul", normal, self._column(f"{name}.weight", layer.weight))
        else:
            normal = self._scale(normal, name, [2, 3])
        return graph.op("Add", normal, self._column(f"{name}.bias", layer.bias))

    def layer_norm(self, name: str, layer: nn.LayerNorm, x: str) -> str:
        """Layer norm of [batch, tokens, width]."""
        graph = self._enter(name)
        bias = self._parameter(f"{name}.bias", layer.bias)
        options = {"axis": -1, "epsilon": layer.eps}
        if self._plan is Plan.DENSE:
            weight = self._parameter(f"{name}.weight", layer.weight)
            return graph.op("LayerNormalization", x, weight, bias, **options)
        ones = graph.repeated(1.0, layer.weight.numel(), self._dtype)
        normal = graph.op("LayerNormalization", x, ones, **options)
        return graph.op("Add", self._scale(normal, name, [1]), bias)

    def _read_rows(self, rows: RowLayout) -> None:
        """Declare the slabs, gather the rows of the batch, and cut them into layers."""
        graph = self.graph
        graph.scope = "rows"
        if self._plan is Plan.DENSE and not rows.targets:
            # No row reaches this graph: runtimes complain of an input that nothing reads.
            return
        index = graph.input("adapter_index", torch.int64, ["batch"])
        if self._plan is not Plan.DENSE:
            slab = graph.input("spectral_slab", torch.float32, ["slots", rows.spectral_size])
            spans = list(rows.layout.spans())
            gathered = graph.op("Gather", slab, index, axis=0)
            sizes = graph.integers(*(end - begin for _, begin, end in spans))
            parts = graph.ops("Split", len(spans), gathered, sizes, axis=1)
            self._values = {name: part for (name, _, _), part in zip(spans, parts, strict=True)}
        if rows.targets:
            slab = graph.input("lowrank_slab", torch.float32, ["slots", rows.lowrank_size])
            gathered = graph.op("Gather", slab, index, axis=0)
            sizes = graph.integers(*(size for target in rows.targets for size in target.sizes))
            split = iter(graph.ops("Split", 2 * len(rows.targets), gathered, sizes, axis=1))
            self._branches = {
                target.name: (
                    self._own(graph.reshape(next(split), 0, target.rank, target.cols)),
                    self._own(graph.reshape(next(split), 0, target.rows, target.rank)),
                )
                for target in rows.targets
            }

    def _confined(self, name: str, product: str, axis: int) -> str:
        mask = self.masks.get(transformer_of(name))
        if mask is None:
            return product
        return self.graph.op("Mul", product, self._own(self.graph.op("Unsqueeze", mask, self.graph.integers(axis))))

    def _scale(self, value: str, name: str, axes: list[int]) -> str:
        """Multiply by the layer's row values in fp32, whatever the dtype of the weights."""
        graph = self.graph
        factor = graph.op("Unsqueeze", self._values[name], graph.integers(*axes)) if axes else self._values[name]
        if self._dtype == torch.float32:
            return graph.op("Mul", value, factor)
        return self._own(graph.op("Mul", graph.cast(value, torch.float32), factor))

    def _own(self, value: str) -> str:
        return value if self._dtype == torch.float32 else self.graph.cast(value, self._dtype)

    def _transposed(self, name: str, matrix: Tensor) -> str:
        return self._parameter(f"{name}.transposed", matrix.T)

    def _column(self, name: str, vector: Tensor) -> str:
        return self._parameter(name, vector[:, None, None])

    def _parameter(self, name: str, tensor: Tensor) -> str:
        return self.graph.weight(name, tensor, self._dtype)

    def _enter(self, name: str) -> GraphWriter:
        self.graph.scope = name
        self.written.add(name)
        return self.graph
