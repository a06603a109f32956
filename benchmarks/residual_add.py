"""Sum every residual of a UNet: the ends of resnets and transformers, and of the blocks in these. Through run_gpu.py.

Baseline: the sums in torch, two where a convolution's bias is added with them. A linear layer adds its own bias.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from hueshift.kernels.bench import Case, Weight, floor_ms
from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.launch_table import LaunchConfig, architecture, candidates
from hueshift.kernels.residual_add import add_launch, reference, residual_add

KERNEL = "residual_add"
DTYPE = torch.float16
BATCH = 16
# The layers whose outputs are summed with what they branched off from.
ENDS = (".conv2", ".proj_out", ".attn1.to_out.0", ".attn2.to_out.0", ".ff.net.2")

Sum = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Sums:
    """The tensors of all sums; tensors of one shape are shared between layers."""

    def __init__(self, weights: Sequence[Weight], device: torch.device) -> None:
        """Allocate for BATCH samples, pictures channels_last."""
        made: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for weight in weights:
            picture = len(weight.shape) == 4
            shape = (weight.rows, *weight.input) if picture else (*weight.input, weight.rows)
            if shape not in made:
                form = torch.channels_last if picture else torch.contiguous_format
                x, y = (torch.randn(BATCH, *shape, device=device).to(DTYPE, memory_format=form) for _ in range(2))
                made[shape] = (x, y)
            bias = torch.randn(weight.rows, device=device).to(DTYPE) if picture else None
            self.calls.append((*made[shape], bias))

    def run(self, one: Sum) -> None:
        """Make all sums."""
        for call in self.calls:
            one(*call)

    @property
    def bytes(self) -> float:
        """Bytes of all sums: x and y read, the result written."""
        return sum(3.0 * x.numel() * x.element_size() for x, _, _ in self.calls)

    def check(self, one: Sum) -> float:
        """Return the largest error against float64 of one sum in five."""
        worst = 0.0
        for x, y, bias in self.calls[::5]:
            want = reference(x.double(), y.double(), None if bias is None else bias.double())
            worst = max(worst, relative_error(one(x, y, bias), want))
        return worst


def add_in_torch(x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """Return the sum as the layers make it today: the convolution's bias first, then the skip."""
    return x + y if bias is None else x + (y + bias[:, None, None])


def add_with(config: LaunchConfig, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """Return the sum with a configuration of the sweep."""
    out = torch.empty_like(x)
    add_launch(out, x, y, bias, config).run()
    return out


def cases(models: Mapping[str, Sequence[Weight]], device: torch.device, sweep: bool) -> Iterator[Case]:
    """Yield one case a model; with `sweep`, each model under every launch configuration."""
    configs: list[LaunchConfig | None] = [*candidates(architecture(device), KERNEL)] if sweep else [None]
    for model, every in models.items():
        sums = Sums([weight for weight in every if weight.name.endswith(ENDS)], device)
        for number, config in enumerate(configs):
            one: Sum = residual_add if config is None else partial(add_with, config)
            yield Case(
                case=f"{model}-{number}" if sweep else model,
                works=[partial(sums.run, one)],
                baseline="a sum or two in torch per layer",
                baselines=[partial(sums.run, add_in_torch)],
                flops=0.0,
                bytes=sums.bytes,
                floor_ms=floor_ms(0, sums.bytes),
                check=partial(sums.check, one),
                tolerance=TOLERANCES[DTYPE],
                details={"batch": BATCH, "config": None if config is None else asdict(config)},
            )
