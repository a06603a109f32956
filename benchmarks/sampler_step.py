"""Guide and step a batch of latents. Run through benchmarks/run_gpu.py.

Target: within 1.3 times of a device copy of the same bytes, which is the baseline.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from hueshift.kernels.bench import Case, Weight, floor_ms
from hueshift.kernels.compare import relative_error
from hueshift.kernels.launch_table import LaunchConfig, architecture, candidates
from hueshift.kernels.sampler_step import reference, sampler_step, step_launch

KERNEL = "sampler_step"
# Sets of data that together are several times the 50 MB of L2.
TOTAL_BYTES = 400e6
# Case, samples and side of the latents.
SIZES = (("sd15", 8, 64), ("sd15-large", 256, 64), ("sdxl", 8, 128), ("sdxl-large", 64, 128))


class Batch:
    """One batch of latents: guidance, and the last step's estimate (DPM-Solver++ 2M); no noise."""

    def __init__(self, samples: int, side: int, device: torch.device) -> None:
        """Allocate fp32 latents and an fp16 UNet output of two rows a sample."""
        shape = (samples, 4, side, side)
        self.x = torch.randn(shape, device=device)
        self.prev = torch.randn(shape, device=device)
        self.out = torch.randn(2 * samples, *shape[1:], device=device, dtype=torch.float16)
        self.cond = torch.arange(samples, device=device) * 2 + 1
        self.uncond = torch.arange(samples, device=device) * 2
        self.guidance = torch.full((samples,), 7.5, device=device)
        # A step that neither grows nor shrinks over thousands of replays.
        self.coefficients = torch.tensor([0.5, 0.01, 0.1, 0.0, 0.5, 0.01], device=device).repeat(samples, 1)

    @property
    def bytes(self) -> float:
        """Bytes read and written by one step: x, prev and out read, x and prev written."""
        return float(4 * self.x.numel() * self.x.element_size() + self.out.numel() * self.out.element_size())

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the kernel's arguments in order."""
        return self.x, self.prev, self.out, self.cond, self.uncond, self.guidance, self.coefficients

    def work(self, config: LaunchConfig | None) -> Callable[[], None]:
        """Return one step, with the launch table's choice or with `config`."""
        if config is None:
            return partial(sampler_step, *self.arguments())
        return step_launch(*self.arguments(), config=config).run

    def check(self, config: LaunchConfig | None) -> float:
        """Return the larger error of x and prev against float64."""
        x, prev, out, cond, uncond, guidance, coefficients = self.arguments()
        exact = (x.double(), prev.double())
        reference(*exact, out, cond, uncond, guidance.double(), coefficients.double())
        self.work(config)()
        return max(relative_error(got, want) for got, want in zip((x, prev), exact, strict=True))


def cases(models: Mapping[str, Sequence[Weight]], device: torch.device, sweep: bool) -> Iterator[Case]:
    """Yield small and large batches at the latent sizes of SD1.5 and SDXL; with `sweep`, each configuration."""
    configs = candidates(architecture(device), KERNEL)
    for name, samples, side in SIZES:
        for number, config in enumerate(configs if sweep else [None]):
            one = Batch(samples, side, device)
            batches = [one] + [Batch(samples, side, device) for _ in range(int(TOTAL_BYTES / one.bytes))]
            # A copy moves each of its bytes twice: read and written.
            sources = [torch.randn(int(one.bytes / 8), device=device) for _ in batches]
            targets = [torch.empty_like(source) for source in sources]
            yield Case(
                case=f"{name}-{number}" if sweep else name,
                works=[batch.work(config) for batch in batches],
                baseline="device copy of the same bytes",
                baselines=[partial(to.copy_, source) for to, source in zip(targets, sources, strict=True)],
                flops=10.0 * one.x.numel(),
                bytes=one.bytes,
                floor_ms=floor_ms(0, one.bytes),
                check=partial(one.check, config),
                tolerance=2e-6,
                details={"batch": samples, "config": asdict(config or configs[0])},
            )
