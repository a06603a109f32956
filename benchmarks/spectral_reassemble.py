"""Rebuild every weight of a UNet. Run through benchmarks/run_gpu.py.

Target, one H200, fp16, SD1.5: at most 3.5 ms (floor 2.55). Baseline: scale the smaller factor, then addmm for each
layer, in one CUDA graph.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from math import prod

import torch
from torch import Tensor

from hueshift.kernels.bench import Case, Weight, floor_ms
from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.launch_table import LaunchConfig, architecture, candidates
from hueshift.kernels.spectral_plan import SpectralLayer, SpectralPlan, plan_spectral
from hueshift.kernels.spectral_reassemble import spectral_reassemble

KERNEL = "spectral_reassemble"
DTYPE = torch.float16


def make_layers(weights: Sequence[Weight], device: torch.device) -> list[SpectralLayer]:
    """Return layers with random factors of a decomposition's scale; times do not depend on orthogonality."""
    layers = []
    offset = 0
    for weight in weights:
        u = torch.randn(weight.rows, weight.rank, device=device, dtype=DTYPE) * weight.rows**-0.5
        vh = torch.randn(weight.rank, weight.cols, device=device, dtype=DTYPE) * weight.cols**-0.5
        base = torch.randn(weight.shape, device=device, dtype=DTYPE) * 0.02
        if base.dim() == 4:
            base = base.to(memory_format=torch.channels_last)
        sigma = torch.rand(weight.rank, device=device).sort(descending=True).values
        layers.append(SpectralLayer(u, sigma, vh, base, torch.empty_like(base), offset))
        offset += weight.rank
    return layers


def addmm_all(layers: Sequence[SpectralLayer], rows: Tensor, weights: Tensor) -> None:
    """Do the same with cuBLAS, layer by layer, through a scaled copy of the smaller factor."""
    total = (weights[:, None] * rows).sum(0)
    for layer in layers:
        part = total[layer.offset : layer.offset + layer.rank]
        shift = (torch.relu(layer.sigma + part) - layer.sigma).to(DTYPE)
        left, right = layer.u, layer.vh
        if left.numel() <= right.numel():
            left = left * shift
        else:
            right = right * shift[:, None]
        torch.addmm(matrix(layer.base), left, right, out=matrix(layer.out))


def matrix(weight: Tensor) -> Tensor:
    """Return the weight's memory as a row-major matrix: the baseline is spared the permutation for channels_last."""
    cols = prod(weight.shape[1:])
    return weight.as_strided((weight.shape[0], cols), (cols, 1))


def check(plan: SpectralPlan, rows: Tensor, weights: Tensor) -> float:
    """Return the largest relative error of about twelve layers, from the smallest to the largest, against float64."""
    for layer in plan.layers:
        layer.out.fill_(float("nan"))
    spectral_reassemble(plan, rows, weights)
    worst = 0.0
    for layer in sorted(plan.layers, key=lambda one: one.out.numel())[:: max(1, len(plan.layers) // 12)]:
        part = rows[:, layer.offset : layer.offset + layer.rank].double()
        sigma = layer.sigma.double()
        shift = torch.relu(sigma + (weights.double()[:, None] * part).sum(0)) - sigma
        change = (layer.u.double() * shift) @ layer.vh.double()
        worst = max(worst, relative_error(layer.out, layer.base.double() + change.view(layer.base.shape)))
    return worst


def cases(models: Mapping[str, Sequence[Weight]], device: torch.device, sweep: bool) -> Iterator[Case]:
    """Yield one case a model, and SD1.5 with two adapters; with `sweep`, SD1.5 under every launch configuration."""
    configs = candidates(architecture(device), KERNEL)
    for model, weights in models.items():
        layers = make_layers(weights, device)
        if sweep:
            for number, config in enumerate(configs):
                yield make_case(f"{model}-{number}", layers, weights, config, 1)
            return
        for adapters in (1, 2) if model == "sd15" else (1,):
            yield make_case(model if adapters == 1 else f"{model}-two-adapters", layers, weights, configs[0], adapters)


def make_case(
    name: str, layers: Sequence[SpectralLayer], weights: Sequence[Weight], config: LaunchConfig, adapters: int
) -> Case:
    """Return the comparison of one plan."""
    device = layers[0].base.device
    plan = plan_spectral(layers, config=config)
    rows = torch.randn(adapters, plan.row_size, device=device) * 0.05
    share = torch.full((adapters,), 1 / adapters, device=device)
    work = [(2.0 * w.rows * w.cols * w.rank, 2.0 * (w.rank * (w.rows + w.cols) + 2 * w.rows * w.cols)) for w in weights]
    return Case(
        case=name,
        works=[partial(spectral_reassemble, plan, rows, share)],
        baseline="scaled factor and addmm per layer",
        baselines=[partial(addmm_all, layers, rows, share)],
        flops=sum(flops for flops, _ in work),
        bytes=sum(moved for _, moved in work),
        floor_ms=sum(floor_ms(flops, moved) for flops, moved in work),
        check=partial(check, plan, rows, share),
        tolerance=TOLERANCES[DTYPE],
        details={"batch": adapters, "config": asdict(config)},
    )
