"""Run every linear layer of a UNet in factored form with per-sample singular values. Through benchmarks/run_gpu.py.

Target, one H200, fp16: together with factored_conv at most +15 % over the dense UNet at batch 16 (naive: +22 to 36 %).
`over_dense` is the time over that of the same layers dense. Baseline: linear, product with the gathered singular
values, linear, in one CUDA graph.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from hueshift.kernels.bench import Case, Weight, floor_ms
from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.factored_linear import factored_linear, second_product
from hueshift.kernels.launch_table import LaunchConfig, candidates_by_class
from hueshift.kernels.product import CLASSES, product_launch, shape_class

KERNEL = "factored_linear"
DTYPE = torch.float16
BATCH = 16
SLOTS = 16


class Layers:
    """The tensors of all layers; inputs of one shape are shared between layers."""

    def __init__(self, weights: Sequence[Weight], device: torch.device) -> None:
        """Allocate for BATCH samples and SLOTS adapters."""
        inputs: dict[tuple[int, int], Tensor] = {}
        self.index = torch.arange(BATCH, device=device, dtype=torch.int32) % SLOTS
        self.calls = []
        for weight in weights:
            key = (weight.input[0], weight.cols)
            if key not in inputs:
                inputs[key] = torch.randn(BATCH, *key, device=device, dtype=DTYPE)
            self.calls.append(
                {
                    "x": inputs[key],
                    "u": torch.randn(weight.rows, weight.rank, device=device, dtype=DTYPE) * weight.rank**-0.5,
                    "vh": torch.randn(weight.rank, weight.cols, device=device, dtype=DTYPE) * weight.cols**-0.5,
                    "sigma": torch.rand(SLOTS, weight.rank, device=device),
                    "bias": torch.randn(weight.rows, device=device, dtype=DTYPE),
                }
            )
        self.dense = [torch.randn(weight.rows, weight.cols, device=device, dtype=DTYPE) * 0.02 for weight in weights]

    def run(self) -> None:
        """Run all layers with the launch table's choices."""
        for call in self.calls:
            factored_linear(index=self.index, **call)

    def run_with(self, config: LaunchConfig, chosen_class: str) -> None:
        """Run the layers of one shape class with `config`, the others with the table's choices."""
        for call in self.calls:
            self.call_with(call, config, chosen_class)

    def call_with(self, call: Mapping[str, Tensor], config: LaunchConfig | None, chosen_class: str) -> Tensor:
        """Return one layer's output, with `config` if it is of that shape class."""
        x = call["x"]
        samples, tokens, width = x.shape
        rank = call["u"].shape[1]
        if config is None or shape_class(tokens, rank) != chosen_class:
            return factored_linear(index=self.index, **call)
        scaled = torch.empty(samples * tokens, rank, dtype=DTYPE, device=x.device)
        rows = x.view(samples * tokens, width)
        product_launch(
            scaled, rows, call["vh"], tokens=tokens, config=config, sigma=call["sigma"], index=self.index
        ).run()
        return second_product(scaled, call["u"], call["bias"], tokens, config).view(samples, tokens, -1)

    def run_torch(self) -> None:
        """Run all layers as two linear maps with a product between them."""
        for call in self.calls:
            scale = call["sigma"].index_select(0, self.index).to(DTYPE)[:, None, :]
            functional.linear(functional.linear(call["x"], call["vh"]) * scale, call["u"], call["bias"])

    def run_dense(self) -> None:
        """Run the same layers with one weight for everybody."""
        for call, weight in zip(self.calls, self.dense, strict=True):
            functional.linear(call["x"], weight, call["bias"])

    def check(self, config: LaunchConfig | None, chosen_class: str) -> float:
        """Return the largest error against float64 of one layer in ten."""
        worst = 0.0
        for call in self.calls[::10]:
            scale = call["sigma"].double()[self.index.long()][:, None, :]
            want = (call["x"].double() @ call["vh"].double().t() * scale) @ call["u"].double().t()
            got = self.call_with(call, config, chosen_class)
            worst = max(worst, relative_error(got, want + call["bias"].double()))
        return worst


def cases(models: Mapping[str, Sequence[Weight]], device: torch.device, sweep: bool) -> Iterator[Case]:
    """Yield one case a model; with `sweep`, SD1.5 under every launch configuration."""
    for model, every in models.items():
        weights = [weight for weight in every if len(weight.shape) == 2]
        layers = Layers(weights, device)
        if not sweep:
            yield make_case(model, layers, weights, None, "")
            continue
        for name, chosen_class, config in candidates_by_class(device, KERNEL, CLASSES):
            yield make_case(f"{model}-{name}", layers, weights, config, chosen_class)
        return


def make_case(
    name: str, layers: Layers, weights: Sequence[Weight], config: LaunchConfig | None, chosen_class: str
) -> Case:
    """Return the comparison of all layers together."""
    work = []
    for w in weights:
        rows = BATCH * w.input[0]
        moved = 2.0 * (rows * (w.cols + w.rows) + w.rank * (w.rows + w.cols))
        work.append((2.0 * rows * w.rank * (w.rows + w.cols), moved))
    return Case(
        case=name,
        works=[layers.run if config is None else partial(layers.run_with, config, chosen_class)],
        baseline="linear, scale, linear per layer",
        baselines=[layers.run_torch],
        flops=sum(flops for flops, _ in work),
        bytes=sum(moved for _, moved in work),
        floor_ms=sum(floor_ms(flops, moved) for flops, moved in work),
        check=partial(layers.check, config, chosen_class),
        tolerance=2 * TOLERANCES[DTYPE],
        details={"batch": BATCH, "config": None if config is None else asdict(config)},
        dense=layers.run_dense,
    )
