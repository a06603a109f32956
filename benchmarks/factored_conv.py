"""Run every convolution of a UNet in factored form with per-sample singular values. Through benchmarks/run_gpu.py.

Target as in factored_linear. Baseline: cuDNN with V^T, product with the gathered singular values, 1x1 convolution with
U, channels_last, in one CUDA graph.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from hueshift.kernels.bench import Case, Weight, floor_ms
from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.factored_conv import factored_conv, reference

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

    def run_torch(self) -> None:
        """Run all layers as two convolutions with a product between them."""
        for call, weight in zip(self.calls, self.weights, strict=True):
            shrunk = functional.conv2d(call["x"], call["vh"], None, weight.stride, weight.padding)
            shrunk *= call["sigma"].index_select(0, self.index).to(DTYPE)[:, :, None, None]
            functional.conv2d(shrunk, call["u"][:, :, None, None], call["bias"])

    def run_dense(self) -> None:
        """Run the same layers with one weight for everybody."""
        for call, weight, full in zip(self.calls, self.weights, self.dense, strict=True):
            functional.conv2d(call["x"], full, call["bias"], weight.stride, weight.padding)

    def check(self) -> float:
        """Return the largest error against float64 of one layer in ten, two samples each."""
        worst = 0.0
        for call, weight in list(zip(self.calls, self.weights, strict=True))[::10]:
            few = {**call, "x": call["x"][:2]}
            geometry = {"stride": weight.stride, "padding": weight.padding}
            exact = {name: tensor.double() for name, tensor in few.items()}
            want = reference(**exact, index=self.index[:2], stride=weight.stride, padding=weight.padding)
            got = factored_conv(**few, index=self.index[:2], stride=geometry["stride"], padding=geometry["padding"])
            worst = max(worst, relative_error(got, want))
        return worst


def cases(models: Mapping[str, Sequence[Weight]], device: torch.device, sweep: bool) -> Iterator[Case]:
    """Yield one case a model. A sweep is factored_linear's: the kernel is the same."""
    if sweep:
        return
    for model, every in models.items():
        weights = [weight for weight in every if len(weight.shape) == 4]
        layers = Layers(weights, device)
        work = []
        for w in weights:
            pixels_in = BATCH * w.input[0] * w.input[1]
            pixels = pixels_in // w.stride**2
            moved = 2.0 * (pixels_in * w.shape[1] + pixels * w.rows + w.rank * (w.rows + w.cols))
            work.append((2.0 * pixels * w.rank * (w.rows + w.cols), moved))
        yield Case(
            case=model,
            works=[layers.run],
            baseline="convolution, scale, 1x1 convolution per layer",
            baselines=[layers.run_torch],
            flops=sum(flops for flops, _ in work),
            bytes=sum(moved for _, moved in work),
            floor_ms=sum(floor_ms(flops, moved) for flops, moved in work),
            check=layers.check,
            tolerance=2 * TOLERANCES[DTYPE],
            details={"batch": BATCH},
            dense=layers.run_dense,
        )
