"""Run all attention projections of a UNet with every sample's own low-rank branch. Run through benchmarks/run_gpu.py.

Target, one H200, fp16, SD1.5 at UNet batch 16: `share_of_step`, the time beyond the same layers dense, at most 4 % of
the UNet step (34.4 ms dense and compiled). Baseline: the dense product, then lowrank_residual, in one CUDA graph.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hueshift.kernels.bench import STEP_MS, Case, Weight, floor_ms
from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.launch_table import LaunchConfig, candidates_by_class
from hueshift.kernels.lowrank_linear import fuses, linear_launch, lowrank_linear, reference
from hueshift.kernels.product import shape_class

KERNEL = "lowrank_linear"
DTYPE = torch.float16
BATCH = 16
SLOTS = 16


class Layers:
    """The tensors of all layers; inputs of one shape are shared between layers."""

    def __init__(self, weights: Sequence[Weight], rank: int, device: torch.device) -> None:
        """Allocate for BATCH samples and SLOTS adapters."""
        inputs: dict[tuple[int, int], Tensor] = {}
        index = torch.arange(BATCH, device=device, dtype=torch.int32) % SLOTS
        scales = torch.ones(SLOTS, device=device)
        self.calls: list[dict[str, Any]] = []
        for weight in weights:
            key = (weight.input[0], weight.cols)
            if key not in inputs:
                inputs[key] = torch.randn(BATCH, *key, device=device, dtype=DTYPE)
            self.calls.append(
                {
                    "x": inputs[key],
                    "weight": torch.randn(weight.rows, weight.cols, device=device, dtype=DTYPE) * weight.cols**-0.5,
                    "bias": torch.randn(weight.rows, device=device, dtype=DTYPE),
                    "a": torch.randn(SLOTS, rank, weight.cols, device=device, dtype=DTYPE) * 0.05,
                    "b": torch.randn(SLOTS, weight.rows, rank, device=device, dtype=DTYPE) * 0.05,
                    "index": index,
                    "scales": scales,
                }
            )

    def run(self, one: Callable[..., Tensor]) -> None:
        """Run all layers."""
        for call in self.calls:
            one(**call)

    def run_dense(self) -> None:
        """Run the same layers without branches."""
        for call in self.calls:
            functional.linear(call["x"], call["weight"], call["bias"])

    def check(self, one: Callable[..., Tensor]) -> float:
        """Return the largest error against float64 of one layer in ten."""
        worst = 0.0
        for call in self.calls[::10]:
            slots = call["index"].long()
            x = call["x"].double()
            want = x @ call["weight"].double().t() + call["bias"].double()
            want += (x @ call["a"].double()[slots].transpose(1, 2)) @ call["b"].double()[slots].transpose(1, 2)
            worst = max(worst, relative_error(one(**call), want))
        return worst


def one_with(config: LaunchConfig, chosen_class: str, **call: Any) -> Tensor:
    """Return one layer's output, with `config` if it is of that shape class and fuses."""
    x, weight = call["x"], call["weight"]
    wide = shape_class(x.shape[1], weight.shape[0]) == chosen_class
    if not wide or not fuses(x, weight, call["a"], call["b"]):
        return lowrank_linear(**call)
    y: Tensor = x.new_empty(*x.shape[:2], weight.shape[0])
    linear_launch(y, mask=None, config=config, **call).run()
    return y


def cases(models: Mapping[str, Sequence[Weight]], device: torch.device, sweep: bool) -> Iterator[Case]:
    """Yield ranks 4, 16 and 64 for SD1.5 and 16 for SDXL; with `sweep`, SD1.5 under every launch configuration."""
    for model, every in models.items():
        weights = [weight for weight in every if ".attn" in weight.name and ".to_" in weight.name]
        for rank in (16,) if sweep or model != "sd15" else (4, 16, 64):
            layers = Layers(weights, rank, device)
            name = model if rank == 16 else f"{model}-rank-{rank}"
            if not sweep:
                yield make_case(name, layers, weights, rank, lowrank_linear, STEP_MS.get(model))
                continue
            for number, chosen_class, config in candidates_by_class(device, KERNEL, ("whole_tiles", "narrow_tiles")):
                one = partial(one_with, config, chosen_class)
                case = make_case(f"{name}-{number}", layers, weights, rank, one, STEP_MS.get(model))
                case.details["config"] = asdict(config)
                yield case
        if sweep:
            return


def make_case(
    name: str,
    layers: Layers,
    weights: Sequence[Weight],
    rank: int,
    one: Callable[..., Tensor],
    step_ms: float | None,
) -> Case:
    """Return the comparison of all layers together."""
    work = []
    for w in weights:
        rows = BATCH * w.input[0]
        moved = 2.0 * (rows * (w.cols + w.rows) + w.rows * w.cols + SLOTS * rank * (w.rows + w.cols))
        work.append((2.0 * rows * (w.rows * w.cols + rank * (w.rows + w.cols)), moved))
    return Case(
        case=name,
        works=[partial(layers.run, one)],
        baseline="dense product, then lowrank_residual per layer",
        baselines=[partial(layers.run, reference)],
        flops=sum(flops for flops, _ in work),
        bytes=sum(moved for _, moved in work),
        floor_ms=sum(floor_ms(flops, moved) for flops, moved in work),
        check=partial(layers.check, one),
        tolerance=2 * TOLERANCES[DTYPE],
        details={"batch": BATCH, "rank": rank, "step_ms": step_ms},
        dense=layers.run_dense,
    )
