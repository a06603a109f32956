"""Run the GEGLU of every feed-forward of a UNet. Through benchmarks/run_gpu.py.

Baseline: chunk, gelu and product in torch, as diffusers' GEGLU.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from hueshift.kernels.bench import Case, Weight, floor_ms
from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.gated_gelu import gated_gelu, gelu_launch, reference
from hueshift.kernels.launch_table import LaunchConfig, architecture, candidates

KERNEL = "gated_gelu"
DTYPE = torch.float16
BATCH = 16

Gate = Callable[[Tensor], Tensor]


class Gates:
    """The inputs of all feed-forwards; those of one shape are shared."""

    def __init__(self, weights: Sequence[Weight], device: torch.device) -> None:
        """Allocate what the first linear layer of each leaves for BATCH samples."""
        made: dict[tuple[int, int], Tensor] = {}
        for weight in weights:
            key = (weight.input[0], weight.rows)
            if key not in made:
                made[key] = torch.randn(BATCH, *key, device=device, dtype=DTYPE)
        self.calls = [made[weight.input[0], weight.rows] for weight in weights]

    def run(self, one: Gate) -> None:
        """Run all of them."""
        for x in self.calls:
            one(x)

    @property
    def bytes(self) -> float:
        """Bytes of all: both halves read, the result written."""
        return sum(1.5 * x.numel() * x.element_size() for x in self.calls)

    def check(self, one: Gate) -> float:
        """Return the largest error against float64 of one in five."""
        return max(relative_error(one(x), reference(x.double())) for x in self.calls[::5])


def gate_in_torch(x: Tensor) -> Tensor:
    """Return the product as the UNet makes it today."""
    value, gate = x.chunk(2, dim=-1)
    return value * functional.gelu(gate)


def gate_with(config: LaunchConfig, x: Tensor) -> Tensor:
    """Return the product with a configuration of the sweep."""
    out = x.new_empty(*x.shape[:2], x.shape[2] // 2)
    gelu_launch(out, x, config).run()
    return out


def cases(models: Mapping[str, Sequence[Weight]], device: torch.device, sweep: bool) -> Iterator[Case]:
    """Yield one case a model; with `sweep`, each model under every launch configuration."""
    configs: list[LaunchConfig | None] = [*candidates(architecture(device), KERNEL)] if sweep else [None]
    for model, every in models.items():
        gates = Gates([weight for weight in every if weight.name.endswith(".ff.net.0.proj")], device)
        for number, config in enumerate(configs):
            one: Gate = gated_gelu if config is None else partial(gate_with, config)
            yield Case(
                case=f"{model}-{number}" if sweep else model,
                works=[partial(gates.run, one)],
                baseline="chunk, gelu, product per layer",
                baselines=[partial(gates.run, gate_in_torch)],
                flops=0.0,
                bytes=gates.bytes,
                floor_ms=floor_ms(0, gates.bytes),
                check=partial(gates.check, one),
                tolerance=TOLERANCES[DTYPE],
                details={"batch": BATCH, "config": None if config is None else asdict(config)},
            )
