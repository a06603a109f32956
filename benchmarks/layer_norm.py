"""Run the layer norms of every transformer of a UNet with each sample's own weights. Through benchmarks/run_gpu.py.

Baseline: torch's layer norm without weights, then the gathered rows and the bias in one pass.
`dense_ms` is torch's layer norm with one row of weights for everybody. The `-sum` cases are the same behind the sum of
two tensors, as two norms of three stand in a block.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hueshift.kernels.bench import Case, Weight, floor_ms
from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.launch_table import LaunchConfig, architecture, candidates
from hueshift.kernels.layer_norm import add_layer_norm, layer_norm, norm_launch, reference

KERNEL = "layer_norm"
DTYPE = torch.float16
BATCH = 16
SLOTS = 16
EPS = 1e-5
# The layers behind the three norms of a block.
BEHIND = (".attn1.to_q", ".attn2.to_q", ".ff.net.0.proj")

Norm = Callable[..., Tensor]


class Norms:
    """The tensors of all norms; inputs of one shape are shared, weights are slices of one slab as an adapter's row."""

    def __init__(self, weights: Sequence[Weight], device: torch.device) -> None:
        """Allocate for BATCH samples and SLOTS adapters."""
        made: dict[tuple[int, int], Tensor] = {}
        index = torch.arange(BATCH, device=device, dtype=torch.int32) % SLOTS
        slab = torch.rand(SLOTS, sum(weight.cols for weight in weights), device=device) + 0.5
        self.calls: list[dict[str, Any]] = []
        self.dense: list[tuple[Tensor, Tensor, Tensor]] = []
        begin = 0
        for weight in weights:
            key = (weight.input[0], weight.cols)
            if key not in made:
                made[key] = torch.randn(BATCH, *key, device=device, dtype=DTYPE)
            rows = slab[:, begin : begin + weight.cols]
            begin += weight.cols
            bias = torch.randn(weight.cols, device=device, dtype=DTYPE)
            self.calls.append({"x": made[key], "weight": rows, "bias": bias, "eps": EPS, "index": index})
            self.dense.append((made[key], rows[0].to(DTYPE), bias))

    def run(self, one: Norm) -> None:
        """Run all norms."""
        for call in self.calls:
            one(**call)

    def run_dense(self) -> None:
        """Run the same norms with one row of weights for everybody."""
        for x, weight, bias in self.dense:
            functional.layer_norm(x, (x.shape[2],), weight, bias, EPS)

    def run_sums(self, one: Callable[..., Any]) -> None:
        """Run all of them behind a sum."""
        for call in self.calls:
            one(residual=call["x"], **call)

    def run_dense_sums(self) -> None:
        """The same with one row of weights for everybody."""
        for x, weight, bias in self.dense:
            functional.layer_norm(x + x, (x.shape[2],), weight, bias, EPS)

    @property
    def bytes(self) -> float:
        """Bytes of all norms: x read, the result written; the weights are nothing beside them."""
        return sum(2.0 * x.numel() * x.element_size() for x, _, _ in self.dense)

    def check(self, one: Norm) -> float:
        """Return the largest error against float64 of one norm in seven."""
        worst = 0.0
        for call in self.calls[::7]:
            exact = {name: call[name].double() for name in ("x", "weight", "bias")}
            worst = max(worst, relative_error(one(**call), reference(**{**call, **exact})))
        return worst


def add_in_torch(x: Tensor, residual: Tensor, **norm: Any) -> tuple[Tensor, Tensor]:
    """Return the sum, and its norm as norm_in_torch."""
    total = x + residual
    return total, norm_in_torch(total, **norm)


def norm_in_torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float, index: Tensor) -> Tensor:
    """Return the norm in as few passes as torch can."""
    normal = functional.layer_norm(x, (x.shape[2],), None, None, eps)
    return torch.addcmul(bias, normal, weight.index_select(0, index).to(x.dtype)[:, None])


def norm_with(config: LaunchConfig, x: Tensor, weight: Tensor, bias: Tensor, eps: float, index: Tensor) -> Tensor:
    """Return the norm with a configuration of the sweep."""
    out = torch.empty_like(x)
    norm_launch(out, x, weight, bias, eps, index, config).run()
    return out


def cases(models: Mapping[str, Sequence[Weight]], device: torch.device, sweep: bool) -> Iterator[Case]:
    """Yield one case a model; with `sweep`, each model under every launch configuration."""
    configs: list[LaunchConfig | None] = [*candidates(architecture(device), KERNEL)] if sweep else [None]
    for model, every in models.items():
        norms = Norms([weight for weight in every if weight.name.endswith(BEHIND)], device)
        for number, config in enumerate(configs):
            one: Norm = layer_norm if config is None else partial(norm_with, config)
            yield Case(
                case=f"{model}-{number}" if sweep else model,
                works=[partial(norms.run, one)],
                baseline="norm, then weights and bias per layer",
                baselines=[partial(norms.run, norm_in_torch)],
                flops=0.0,
                bytes=norms.bytes,
                floor_ms=floor_ms(0, norms.bytes),
                check=partial(norms.check, one),
                tolerance=TOLERANCES[DTYPE],
                details={"batch": BATCH, "config": None if config is None else asdict(config)},
                dense=norms.run_dense,
            )
        if not sweep:
            yield sum_case(model, norms)


def sum_case(model: str, norms: Norms) -> Case:
    """Return the comparison of norms behind sums."""
    # Two tensors read and two written. The benchmark's two are one, so that a third is not read from memory.
    moved = 1.5 * norms.bytes
    return Case(
        case=f"{model}-sum",
        works=[partial(norms.run_sums, add_layer_norm)],
        baseline="sum, norm, then weights and bias per layer",
        baselines=[partial(norms.run_sums, add_in_torch)],
        flops=0.0,
        bytes=moved,
        floor_ms=floor_ms(0, moved),
        check=partial(norms.check, lambda **call: add_layer_norm(residual=torch.zeros_like(call["x"]), **call)[1]),
        tolerance=TOLERANCES[DTYPE],
        details={"batch": BATCH},
        dense=norms.run_dense_sums,
    )
