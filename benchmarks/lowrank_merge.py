"""Merge adapters of rank 16 into every attention weight of a UNet. Run through benchmarks/run_gpu.py.

Target, one H200, fp16, SD1.5: at most 0.15 ms (floor 0.089). Baseline: addmm for each layer, in one CUDA graph; of
several adapters with their factors side by side, so that it too passes over a weight once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from hueshift.kernels.bench import Case, Weight, floor_ms
from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.launch_table import LaunchConfig, architecture, candidates
from hueshift.kernels.lowrank_merge import (
    LowRankFactors,
    LowRankMix,
    MergeLayer,
    MergePlan,
    lowrank_merge,
    mix_adapters,
    plan_merge,
)

KERNEL = "lowrank_merge"
DTYPE = torch.float16
RANK = 16


def attention(weights: Sequence[Weight]) -> list[Weight]:
    """Return the weights of to_q, to_k, to_v and to_out."""
    return [weight for weight in weights if ".attn" in weight.name and ".to_" in weight.name]


def make_adapter(weights: Sequence[Weight], device: torch.device) -> dict[int, LowRankFactors]:
    """Return random factors for every weight."""
    return {
        number: LowRankFactors(
            torch.randn(RANK, weight.cols, device=device, dtype=DTYPE) * 0.02,
            torch.randn(weight.rows, RANK, device=device, dtype=DTYPE) * 0.02,
        )
        for number, weight in enumerate(weights)
    }


def side_by_side(plan: MergePlan, mix: LowRankMix) -> tuple[list[Tensor], Tensor]:
    """Return [A_1; A_2; ...] of every layer, and [B_1 B_2 ...] of all below each other: made once, as a mix is."""
    parts = [[adapter[number] for adapter in mix.adapters] for number in range(len(plan.layers))]
    return (
        [torch.cat([part.a for part in layer]) for layer in parts],
        torch.cat([torch.cat([part.b for part in layer], 1) for layer in parts]),
    )


def addmm_all(plan: MergePlan, all_a: Sequence[Tensor], all_b: Tensor, scales: Tensor) -> None:
    """Do the same with cuBLAS: all B scaled at once, then layer by layer."""
    scaled = all_b * scales.to(DTYPE)[:, None].expand(-1, RANK).flatten()
    begin = 0
    for layer, a in zip(plan.layers, all_a, strict=True):
        end = begin + layer.out.shape[0]
        torch.addmm(layer.base, scaled[begin:end], a, out=layer.out)
        begin = end


def check(plan: MergePlan, mix: LowRankMix, scales: Tensor) -> float:
    """Return the largest relative error of a few layers against float64."""
    for layer in plan.layers:
        layer.out.fill_(float("nan"))
    lowrank_merge(plan, mix, scales)
    worst = 0.0
    for number in range(0, len(plan.layers), max(1, len(plan.layers) // 12)):
        want = plan.layers[number].base.double()
        for adapter, scale in zip(mix.adapters, scales.double(), strict=True):
            want = want + scale * (adapter[number].b.double() @ adapter[number].a.double())
        worst = max(worst, relative_error(plan.layers[number].out, want))
    return worst


def cases(models: Mapping[str, Sequence[Weight]], device: torch.device, sweep: bool) -> Iterator[Case]:
    """Yield one and eight adapters for each model; with `sweep`, one under every launch configuration."""
    configs = candidates(architecture(device), KERNEL)
    for model, every in models.items():
        weights = attention(every)
        for adapters in (1,) if sweep else (1, 8):
            for number, config in enumerate(configs if sweep else configs[:1]):
                name = model if adapters == 1 else f"{model}-eight-adapters"
                yield make_case(f"{name}-{number}" if sweep else name, weights, config, adapters, device)


def make_case(name: str, weights: Sequence[Weight], config: LaunchConfig, adapters: int, device: torch.device) -> Case:
    """Return the comparison of one plan and mix."""
    bases = [torch.randn(weight.shape, device=device, dtype=DTYPE) * 0.02 for weight in weights]
    plan = plan_merge([MergeLayer(base, torch.empty_like(base)) for base in bases], config=config)
    mix = mix_adapters(plan, [make_adapter(weights, device) for _ in range(adapters)])
    scales = torch.full((adapters,), 0.5, device=device)
    flops = sum(2.0 * w.rows * w.cols * RANK * adapters for w in weights)
    moved = sum(2.0 * (2 * w.rows * w.cols + adapters * RANK * (w.rows + w.cols)) for w in weights)
    return Case(
        case=name,
        works=[partial(lowrank_merge, plan, mix, scales)],
        baseline="addmm per layer",
        baselines=[partial(addmm_all, plan, *side_by_side(plan, mix), scales)],
        flops=flops,
        bytes=moved,
        floor_ms=floor_ms(flops, moved),
        check=partial(check, plan, mix, scales),
        tolerance=TOLERANCES[DTYPE],
        details={"batch": adapters, "config": asdict(config)},
    )
