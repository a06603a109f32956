"""Run every convolution of a UNet in factored form with per-sample singular values. Through benchmarks/run_gpu.py.

Target as in factored_linear. Baseline: cuDNN with V^T, product with the gathered singular values, then U and the bias
as a product on the pixels, channels_last, in one CUDA graph: cuDNN's 1x1 convolution would pass over its output once
more for the bias. A 1x1 convolution is a product on the pixels throughout, in the same layers dense, too. There the
others leave their biases to what follows, as fused blocks and torch.compile have it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from hueshift.kernels.bench import Case, Weight, floor_ms
from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.factored_conv import CLASSES, expand, expand_class, factored_conv, reference
from hueshift.kernels.launch_table import LaunchConfig, candidates_by_class

KERNEL = "factored_conv"
DTYPE = torch.float16
BATCH = 16
SLOTS = 16


class Layers:
    """The tensors of all layers; inputs of one shape are shared between layers."""

    def __init__(self, weights: Sequence[Weight], device: torch.device) -> None:
        """Allocate for BATCH samples and SLOTS adapters."""
        inputs: dict[tuple[int, ...], Tensor] = {}
        self.index = torch.arange(BATCH, device=device, dtype=torch.int32) % SLOTS
        self.weights = weights
        self.calls = []
        self.dense = []
        for weight in weights:
            key = (weight.shape[1], *weight.input)
            if key not in inputs:
                x = torch.randn(BATCH, *key, device=device, dtype=DTYPE)
                inputs[key] = x.contiguous(memory_format=torch.channels_last)
            vh = torch.randn(weight.rank, *weight.shape[1:], device=device, dtype=DTYPE) * weight.cols**-0.5
            self.calls.append(
                {
                    "x": inputs[key],
                    "u": torch.randn(weight.rows, weight.rank, device=device, dtype=DTYPE) * weight.rank**-0.5,
                    "vh": vh.contiguous(memory_format=torch.channels_last),
                    "sigma": torch.rand(SLOTS, weight.rank, device=device),
                    "bias": torch.randn(weight.rows, device=device, dtype=DTYPE),
                }
            )
            full = torch.randn(weight.shape, device=device, dtype=DTYPE) * 0.02
            self.dense.append(full.contiguous(memory_format=torch.channels_last))

    def run(self) -> None:
        """Run all layers with the launch table's choices."""
        for call, weight in zip(self.calls, self.weights, strict=True):
            factored_conv(index=self.index, stride=weight.stride, padding=weight.padding, **call)

    def run_with(self, config: LaunchConfig, chosen_class: str) -> None:
        """Run the layers whose second product is of one shape class with `config`, the others with the table's."""
        for call, weight in zip(self.calls, self.weights, strict=True):
            self.call_with(call, weight, self.index, config, chosen_class)

    def call_with(
        self, call: Mapping[str, Tensor], weight: Weight, index: Tensor, config: LaunchConfig | None, chosen_class: str
    ) -> Tensor:
        """Return one layer's output, with `config` for its second product if that is of the shape class."""
        u = call["u"]
        tokens = (weight.input[0] // weight.stride) * (weight.input[1] // weight.stride)
        # Products are factored_linear's.
        if config is None or is_product(weight) or expand_class(tokens, u.shape[0]) != chosen_class:
            return factored_conv(index=index, stride=weight.stride, padding=weight.padding, **call)
        shrunk = functional.conv2d(call["x"], call["vh"], None, weight.stride, weight.padding)
        samples, rank, height, width = shrunk.shape
        y = expand(pixels(shrunk).reshape(samples, tokens, rank), u, call["sigma"], index, call["bias"], config)
        return y.view(samples, height, width, u.shape[0]).permute(0, 3, 1, 2)

    def run_torch(self) -> None:
        """Run all layers as a convolution and a product with the scale between them."""
        for call, weight in zip(self.calls, self.weights, strict=True):
            scale = call["sigma"].index_select(0, self.index).to(DTYPE)[:, None, None]
            if is_product(weight):
                shrunk = functional.linear(pixels(call["x"]), call["vh"].flatten(1))
            else:
                shrunk = pixels(functional.conv2d(call["x"], call["vh"], None, weight.stride, weight.padding))
            functional.linear(shrunk.mul_(scale), call["u"], call["bias"])

    def run_dense(self) -> None:
        """Run the same layers with one weight for everybody."""
        for call, weight, full in zip(self.calls, self.weights, self.dense, strict=True):
            if is_product(weight):
                functional.linear(pixels(call["x"]), full.flatten(1), call["bias"])
            else:
                functional.conv2d(call["x"], full, None, weight.stride, weight.padding)

    def check(self, config: LaunchConfig | None, chosen_class: str) -> float:
        """Return the largest error against float64 of one layer in ten, two samples each."""
        worst = 0.0
        for call, weight in list(zip(self.calls, self.weights, strict=True))[::10]:
            few = {**call, "x": call["x"][:2]}
            exact = {name: tensor.double() for name, tensor in few.items()}
            want = reference(**exact, index=self.index[:2], stride=weight.stride, padding=weight.padding)
            got = self.call_with(few, weight, self.index[:2], config, chosen_class)
            worst = max(worst, relative_error(got, want))
        return worst


def is_product(weight: Weight) -> bool:
    """Tell whether a convolution is a product on the pixels."""
    return weight.shape[2:] == (1, 1) and weight.stride == 1


def pixels(x: Tensor) -> Tensor:
    """View pictures [N, C, h, w], channels_last, as [N, h, w, C]."""
    return x.permute(0, 2, 3, 1)


def cases(models: Mapping[str, Sequence[Weight]], device: torch.device, sweep: bool) -> Iterator[Case]:
    """Yield one case a model; with `sweep`, SD1.5 under every launch configuration."""
    for model, every in models.items():
        weights = [weight for weight in every if len(weight.shape) == 4]
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
        read = BATCH * w.input[0] * w.input[1]
        written = read // w.stride**2
        moved = 2.0 * (read * w.shape[1] + written * w.rows + w.rank * (w.rows + w.cols))
        work.append((2.0 * written * w.rank * (w.rows + w.cols), moved))
    return Case(
        case=name,
        works=[layers.run if config is None else partial(layers.run_with, config, chosen_class)],
        baseline="convolution, scale, product per layer",
        baselines=[layers.run_torch],
        flops=sum(flops for flops, _ in work),
        bytes=sum(moved for _, moved in work),
        floor_ms=sum(floor_ms(flops, moved) for flops, moved in work),
        check=partial(layers.check, config, chosen_class),
        tolerance=2 * TOLERANCES[DTYPE],
        details={"batch": BATCH, "config": None if config is None else asdict(config)},
        dense=layers.run_dense,
    )
