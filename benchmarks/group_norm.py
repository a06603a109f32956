"""Normalise every picture of a UNet in channels_last, with SiLU where a convolution follows. Through run_gpu.py.

Baseline: what the UNet ran before: torch's group norm, which goes through the other layout and back, then SiLU; for a
block's second norm after the sum with the time embedding, too. In one CUDA graph.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from hueshift.kernels.bench import Case, Weight, floor_ms
from hueshift.kernels.compare import TOLERANCES, relative_error
from hueshift.kernels.group_norm import CLASSES, KERNEL, group_norm, launches, reference, shape_class
from hueshift.kernels.launch_table import LaunchConfig, candidates_by_class

DTYPE = torch.float16
BATCH = 16
EPS = 1e-5
LARGEST_GROUPS = 32


@dataclass(frozen=True, slots=True)
class Norm:
    """One norm: its picture, and whether SiLU and a shift go with it."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    shift: Tensor | None
    silu: bool

    @property
    def groups(self) -> int:
        """32, as in all of these models; fewer where a test's model has fewer channels."""
        return min(LARGEST_GROUPS, self.x.shape[1])


class Norms:
    """The norms before the convolutions and transformers of a UNet; pictures of one shape are shared."""

    def __init__(self, weights: Sequence[Weight], device: torch.device) -> None:
        """Allocate for BATCH samples."""
        pictures: dict[tuple[int, ...], Tensor] = {}
        self.norms: list[Norm] = []
        for weight in weights:
            kind = weight.name.rsplit(".", 1)[-1]
            if kind not in ("conv1", "conv2", "proj_in", "conv_out"):
                continue
            side = weight.input if len(weight.input) == 2 else (int(weight.input[0] ** 0.5),) * 2
            shape = (BATCH, weight.shape[1], *side)
            if shape not in pictures:
                x = torch.randn(shape, device=device).to(DTYPE)
                pictures[shape] = x.contiguous(memory_format=torch.channels_last)
            channels = shape[1]
            self.norms.append(
                Norm(
                    pictures[shape],
                    torch.rand(channels, device=device).to(DTYPE),
                    torch.randn(channels, device=device).to(DTYPE),
                    torch.randn(BATCH, channels, device=device).to(DTYPE) if kind == "conv2" else None,
                    kind != "proj_in",
                )
            )

    def run(self) -> None:
        """Run all with the launch table's choices."""
        for norm in self.norms:
            self.call(norm, None, "")

    def run_with(self, config: LaunchConfig, chosen: str) -> None:
        """Run all, those of a shape class with `config`."""
        for norm in self.norms:
            self.call(norm, config, chosen)

    def call(self, norm: Norm, config: LaunchConfig | None, chosen: str) -> Tensor:
        """Return one result."""
        if config is None or shape_class(norm.x.shape[2] * norm.x.shape[3]) != chosen:
            return group_norm(norm.x, norm.weight, norm.bias, norm.groups, EPS, shift=norm.shift, silu=norm.silu)
        y = torch.empty_like(norm.x)
        given = (y, norm.x, norm.weight, norm.bias, norm.groups, EPS, None, norm.shift, None)
        for launch in launches(*given, silu=norm.silu, config=config):
            launch.run()
        return y

    def run_torch(self) -> None:
        """Run all as diffusers' layers do."""
        for norm in self.norms:
            x = norm.x if norm.shift is None else norm.x + norm.shift[:, :, None, None]
            y = functional.group_norm(x, norm.groups, norm.weight, norm.bias, EPS)
            y = functional.silu(y) if norm.silu else y
            # The convolution that follows wants channels_last.
            y.contiguous(memory_format=torch.channels_last)

    def check(self, config: LaunchConfig | None, chosen: str) -> float:
        """Return the largest error against float64 of one norm in seven."""
        worst = 0.0
        for norm in self.norms[::7]:
            shift = None if norm.shift is None else norm.shift.double()
            given = (norm.x.double(), norm.weight.double(), norm.bias.double(), norm.groups, EPS)
            want = reference(*given, shift=shift, silu=norm.silu)
            worst = max(worst, relative_error(self.call(norm, config, chosen), want))
        return worst


def cases(models: Mapping[str, Sequence[Weight]], device: torch.device, sweep: bool) -> Iterator[Case]:
    """Yield one case a model; with `sweep`, the first model under every launch configuration."""
    for model, weights in models.items():
        norms = Norms(weights, device)
        if not sweep:
            yield make_case(model, norms, None, "")
            continue
        for name, chosen, config in candidates_by_class(device, KERNEL, CLASSES):
            yield make_case(f"{model}-{name}", norms, config, chosen)
        return


def make_case(name: str, norms: Norms, config: LaunchConfig | None, chosen: str) -> Case:
    """Return the comparison of all norms together."""
    # The least: each picture read once and written once.
    moved = sum(4.0 * norm.x.numel() for norm in norms.norms)
    return Case(
        case=name,
        works=[norms.run if config is None else partial(norms.run_with, config, chosen)],
        baseline="sum, torch's group norm, SiLU and layout per norm",
        baselines=[norms.run_torch],
        flops=0.0,
        bytes=moved,
        floor_ms=floor_ms(0.0, moved),
        check=partial(norms.check, config, chosen),
        tolerance=TOLERANCES[DTYPE],
        details={"batch": BATCH, "config": None if config is None else asdict(config)},
    )
