"""The FULL plan's attention as ONNX nodes: what engines/guided_attention.py does in torch, written into a graph."""

import torch

from hueshift.engines.adapted_layers import transformer_of
from hueshift.engines.graph_layers import GraphLayers
from hueshift.engines.graph_writer import GraphWriter

MASK = "mask"
_EPS = 1e-5


class GraphGuides:
    """Declares the inputs lag [batch, tokens] fp32, lag_source [batch] and reference [batch] int64, and uses them."""

    def __init__(self, graph: GraphWriter, layers: GraphLayers, tokens: int, dtype: torch.dtype) -> None:
        self._graph = graph
        self._dtype = dtype
        self._layers = layers
        graph.scope = "guides"
        lag = graph.input("lag", torch.float32, ["batch", tokens])
        self._lag = graph.op("Unsqueeze", lag, graph.integers(1, 3))
        self._source = graph.input("lag_source", torch.int64, ["batch"])
        self._reference = graph.input("reference", torch.int64, ["batch"])
        zero, one = graph.number(0, torch.int64), graph.number(1, torch.int64)
        own = graph.op("Range", zero, graph.op("Size", self._reference), one)
        shares = graph.op("Not", graph.op("Equal", self._reference, own))
        self._shares = graph.op("Unsqueeze", shares, graph.integers(1, 2, 3))
        self._totals: dict[str, str] = {}
        self._sides: dict[str, str] = {}

    def enter(self, transformer: str, pixels: str) -> None:
        """Note the size of a transformer's input [batch, channels, h, w]."""
        self._graph.scope = transformer
        self._sides[transformer] = self._graph.op("Shape", pixels, start=2)

    def confine(self, attention: str, scores: str) -> None:
        """Make the transformer's mask of its probabilities [batch, heads, positions, tokens]."""
        graph, at = self._graph, transformer_of(attention)
        share = graph.op("MatMul", graph.cast(scores, torch.float32), self._lag)
        share = graph.op("ReduceMean", share, graph.integers(1, 3), keepdims=0)
        if at in self._totals:
            share = graph.op("Add", self._totals[at], share)
        self._totals[at] = share
        # The upper median is the smallest of the P - P // 2 largest.
        positions = graph.op("Shape", share, start=1)
        half = graph.op("Div", positions, graph.integers(2))
        largest, _ = graph.ops("TopK", 2, share, graph.op("Sub", positions, half), axis=1)
        median = graph.op("ReduceMin", largest, graph.integers(1), keepdims=1)
        mask = graph.cast(graph.op("GreaterOrEqual", share, median), torch.float32)
        self._layers.masks[at] = graph.op("Gather", mask, self._source, axis=0)

    def share(self, query: str, key: str, value: str) -> tuple[str, str, str]:
        """Let queries, keys and values [batch, heads, positions, width] take part in the reference's attention."""
        graph = self._graph
        query, key = self._adapted(query), self._adapted(key)
        keys, values = (
            graph.op("Concat", part, graph.op("Gather", part, self._reference, axis=0), axis=2) for part in (key, value)
        )
        return query, keys, values

    def picture(self, sample: str) -> str:
        """Mean of the masks at the latents' resolution, [batch, height, width]."""
        graph = self._graph
        graph.scope = "mask"
        shape = graph.op("Concat", graph.op("Shape", sample, end=1), graph.integers(1), axis=0)
        full = graph.op("Concat", shape, graph.op("Shape", sample, start=2), axis=0)
        total = ""
        for at, mask in self._layers.masks.items():
            grid = graph.op("Reshape", mask, graph.op("Concat", shape, self._sides[at], axis=0))
            options = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
            grid = graph.op("Resize", grid, "", "", full, **options)
            total = graph.op("Add", total, grid) if total else grid
        mean = graph.op("Mul", total, graph.number(1 / len(self._layers.masks), torch.float32))
        return graph.op("Squeeze", mean, graph.integers(1))

    def _adapted(self, x: str) -> str:
        """Give x the reference's statistics, in fp32: sums of squares pass the range of fp16."""
        graph, given = self._graph, x
        if self._dtype != torch.float32:
            x = graph.cast(x, torch.float32)
        mean, deviation = self._statistics(x)
        their_mean, their_deviation = (graph.op("Gather", part, self._reference, axis=0) for part in (mean, deviation))
        normal = graph.op("Div", graph.op("Sub", x, mean), deviation)
        moved = graph.op("Add", graph.op("Mul", normal, their_deviation), their_mean)
        if self._dtype != torch.float32:
            moved = graph.cast(moved, self._dtype)
        return graph.op("Where", self._shares, moved, given)

    def _statistics(self, x: str) -> tuple[str, str]:
        graph, positions = self._graph, self._graph.integers(2)
        mean = graph.op("ReduceMean", x, positions, keepdims=1)
        apart = graph.op("Sub", x, mean)
        variance = graph.op("ReduceMean", graph.op("Mul", apart, apart), positions, keepdims=1)
        return mean, graph.op("Sqrt", graph.op("Add", variance, graph.number(_EPS, torch.float32)))
