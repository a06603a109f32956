"""Run the linear layers on large pictures with each sample's own weight. Run through benchmarks/run_gpu.py.

The layers whose weights an engine puts together for each slot (engines/slot_weights.py): those that see at least as
many tokens as they have singular values. Target, with factored_conv and factored_linear on the others: the factored
UNet at most 15 % over the dense one. Baseline: the weights gathered for the batch, then a batched product; `dense` is
the same layers with one weight for everybody.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from hueshift.kernels.bench import Case, Weight, floor_ms
from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.launch_table import LaunchConfig, candidates_by_class
from hueshift.kernels.slot_linear import CLASSES, KERNEL, linear_launch, reference, shape_class, slot_linear

DTYPE = torch.float16
BATCH = 16
SLOTS = 8


class Layers:
    """The tensors of all layers; inputs of one shape are shared. Weights are not: a step finds none of them in L2."""

    def __init__(self, weights: Sequence[Weight], device: torch.device) -> None:
        """Allocate for BATCH samples and SLOTS adapters; rows of guidance come in pairs."""
        self.index = torch.arange(BATCH, device=device) // 2 % SLOTS
        inputs: dict[tuple[int, int], Tensor] = {}
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        for weight in weights:
            tokens = weight.input[0] if len(weight.input) == 1 else weight.input[0] * weight.input[1]
            shape = (tokens, weight.cols)
            if shape not in inputs:
                inputs[shape] = torch.randn(BATCH, *shape, device=device, dtype=DTYPE)
            slab = torch.randn(SLOTS, weight.rows, weight.cols, device=device, dtype=DTYPE) * weight.cols**-0.5
            self.calls.append((inputs[shape], slab, torch.randn(weight.rows, device=device, dtype=DTYPE)))

    def run(self) -> None:
        """Run all layers with the launch table's choices."""
        for x, slab, bias in self.calls:
            slot_linear(x, slab, self.index, bias)

    def run_with(self, config: LaunchConfig, chosen: str) -> None:
        """Run all layers, those of a shape class with `config`."""
        for call in self.calls:
            self.call(call, config, chosen)

    def call(self, call: tuple[Tensor, Tensor, Tensor], config: LaunchConfig | None, chosen: str) -> Tensor:
        """Return one layer's output."""
        x, slab, bias = call
        if config is None or shape_class(slab.shape[1]) != chosen:
            return slot_linear(x, slab, self.index, bias)
        y = x.new_empty(*x.shape[:2], slab.shape[1])
        linear_launch(y, x, slab, self.index, bias, config).run()
        return y

    def run_torch(self) -> None:
        """Run all layers as torch can: gathered weights, a batched product, the bias."""
        for x, slab, bias in self.calls:
            torch.bmm(x, slab[self.index].transpose(1, 2)).add_(bias)

    def run_dense(self) -> None:
        """Run the same layers with one weight for everybody."""
        for x, slab, bias in self.calls:
            functional.linear(x, slab[0], bias)

    def check(self, config: LaunchConfig | None, chosen: str) -> float:
        """Return the largest error against float64 of one layer in ten."""
        worst = 0.0
        for call in self.calls[::10]:
            x, slab, bias = call
            want = reference(x.double(), slab.double(), self.index, bias.double())
            worst = max(worst, relative_error(self.call(call, config, chosen), want))
        return worst


def is_large(weight: Weight) -> bool:
    """True for a product that sees at least as many tokens as it has singular values, and does not read the prompt."""
    if len(weight.shape) == 4 and weight.shape[2:] != (1, 1):
        return False
    tokens = weight.input[0] if len(weight.input) == 1 else weight.input[0] * weight.input[1]
    return tokens >= weight.rank and "time_emb" not in weight.name


def cases(models: Mapping[str, Sequence[Weight]], device: torch.device, sweep: bool) -> Iterator[Case]:
    """Yield one case a model; with `sweep`, the first model under every launch configuration."""
    for model, every in models.items():
        weights = [weight for weight in every if is_large(weight)]
        layers = Layers(weights, device)
        if not sweep:
            yield make_case(model, layers, weights, None, "")
            continue
        for name, chosen, config in candidates_by_class(device, KERNEL, CLASSES):
            yield make_case(f"{model}-{name}", layers, weights, config, chosen)
        return


def make_case(name: str, layers: Layers, weights: Sequence[Weight], config: LaunchConfig | None, chosen: str) -> Case:
    """Return the comparison of all layers together."""
    flops = sum(2.0 * x.shape[0] * x.shape[1] * x.shape[2] * slab.shape[1] for x, slab, _ in layers.calls)
    moved = sum(
        2.0 * (x.numel() + x.shape[0] * x.shape[1] * slab.shape[1] + slab.numel()) for x, slab, _ in layers.calls
    )
    return Case(
        case=name,
        works=[layers.run if config is None else partial(layers.run_with, config, chosen)],
        baseline="gathered weights, batched product, bias per layer",
        baselines=[layers.run_torch],
        flops=flops,
        bytes=moved,
        floor_ms=floor_ms(flops, moved),
        check=partial(layers.check, config, chosen),
        tolerance=TOLERANCES[DTYPE],
        details={"batch": BATCH, "layers": len(weights), "config": None if config is None else asdict(config)},
        dense=layers.run_dense,
    )
