"""Add every sample's own low-rank branch to all attention projections of a UNet. Run through benchmarks/run_gpu.py.

Target, one H200, fp16, SD1.5 at UNet batch 16: at most +4 % of the UNet step, which took 34.4 ms dense and compiled
(torch 2.11, 64x64 latents). Baseline: gathered factors, bmm and baddbmm for each layer, in one CUDA graph.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from hueshift.kernels.bench import STEP_MS, Case, Weight, floor_ms
from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.launch_table import LaunchConfig, candidates_by_class
from hueshift.kernels.lowrank_residual import FEW_TOKENS, launches, lowrank_residual

KERNEL = "lowrank_residual"
DTYPE = torch.float16
BATCH = 16
SLOTS = 16

Run = Callable[..., object]


def attention(weights: Sequence[Weight]) -> list[Weight]:
    """Return the weights of to_q, to_k, to_v and to_out."""
    return [weight for weight in weights if ".attn" in weight.name and ".to_" in weight.name]


class Layers:
    """The tensors of all layers; activations of one shape are shared between layers, as a UNet's allocator does."""

    def __init__(self, weights: Sequence[Weight], rank: int, device: torch.device) -> None:
        """Allocate for BATCH samples and SLOTS adapters."""
        activations: dict[tuple[str, int, int], Tensor] = {}

        def activation(role: str, tokens: int, width: int) -> Tensor:
            key = (role, tokens, width)
            if key not in activations:
                activations[key] = torch.randn(BATCH, tokens, width, device=device, dtype=DTYPE)
            return activations[key]

        self.index = torch.arange(BATCH, device=device, dtype=torch.int32) % SLOTS
        self.scales = torch.ones(SLOTS, device=device)
        self.calls = [
            (
                activation("y", weight.input[0], weight.rows),
                activation("x", weight.input[0], weight.cols),
                torch.randn(SLOTS, rank, weight.cols, device=device, dtype=DTYPE) * 0.01,
                torch.randn(SLOTS, weight.rows, rank, device=device, dtype=DTYPE) * 0.01,
            )
            for weight in weights
        ]

    def run(self) -> None:
        """Run all layers with the launch table's choices."""
        for y, x, a, b in self.calls:
            lowrank_residual(y, x, a, b, self.index, self.scales)

    def run_with(self, config: LaunchConfig, shape_class: str) -> None:
        """Run the layers of one shape class with `config`, the others with the table's choices."""
        for y, x, a, b in self.calls:
            here = "few_tokens" if y.shape[0] * y.shape[1] < FEW_TOKENS else "many_tokens"
            chosen = config if here == shape_class else None
            for launch in launches(y, x, a, b, self.index, self.scales, None, chosen):
                launch.run()

    def run_torch(self) -> None:
        """Run all layers as batched products."""
        for y, x, a, b in self.calls:
            shrunk = torch.bmm(x, a.index_select(0, self.index).transpose(1, 2))
            shrunk *= self.scales.index_select(0, self.index).to(DTYPE)[:, None, None]
            y.baddbmm_(shrunk, b.index_select(0, self.index).transpose(1, 2))

    def check(self, run: Callable[[], None]) -> float:
        """Return the largest error over fresh outputs, one layer of each shape."""
        first = {(y.data_ptr(), x.data_ptr()): number for number, (y, x, _, _) in enumerate(self.calls)}
        kept = self.calls
        worst = 0.0
        for number in first.values():
            y, x, a, b = kept[number]
            before = y.clone()
            self.calls = [kept[number]]
            run()
            slots = self.index.long()
            change = (x.double() @ a.double()[slots].transpose(1, 2)) @ b.double()[slots].transpose(1, 2)
            worst = max(worst, relative_error(y, before.double() + change))
            y.copy_(before)
        self.calls = kept
        return worst


def cases(models: Mapping[str, Sequence[Weight]], device: torch.device, sweep: bool) -> Iterator[Case]:
    """Yield ranks 4, 16 and 128 for SD1.5 and 16 for SDXL; with `sweep`, SD1.5 under every launch configuration."""
    for model, every in models.items():
        weights = attention(every)
        for rank in (16,) if sweep or model != "sd15" else (4, 16, 128):
            layers = Layers(weights, rank, device)
            name = model if rank == 16 else f"{model}-rank-{rank}"
            if not sweep:
                yield make_case(name, layers, weights, rank, layers.run, STEP_MS.get(model))
                continue
            for number, shape_class, config in candidates_by_class(device, KERNEL, ("many_tokens", "few_tokens")):
                run = partial(layers.run_with, config, shape_class)
                case = make_case(f"{name}-{number}", layers, weights, rank, run, STEP_MS.get(model))
                case.details["config"] = asdict(config)
                yield case
        if sweep:
            return


def make_case(
    name: str,
    layers: Layers,
    weights: Sequence[Weight],
    rank: int,
    run: Callable[[], None],
    step_ms: float | None,
) -> Case:
    """Return the comparison of all layers together."""
    flops = sum(2.0 * BATCH * w.input[0] * rank * (w.rows + w.cols) for w in weights)
    moved = sum(2.0 * BATCH * (w.input[0] * (w.cols + 2 * w.rows) + rank * (w.rows + w.cols)) for w in weights)
    return Case(
        case=name,
        works=[run],
        baseline="gathered factors, bmm and baddbmm per layer",
        baselines=[layers.run_torch],
        flops=flops,
        bytes=moved,
        floor_ms=floor_ms(flops, moved),
        check=partial(layers.check, run),
        tolerance=TOLERANCES[DTYPE],
        details={"batch": BATCH, "rank": rank, "step_ms": step_ms},
    )
