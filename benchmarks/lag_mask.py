"""Make the attention masks of every cross-attention block of a UNet. Run through benchmarks/run_gpu.py.

Baseline: the probabilities in full, a product that sums the chosen tokens, and a sort, block by block, in one CUDA
graph.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from hueshift.kernels.bench import Case, Weight, floor_ms
from hueshift.kernels.compare import relative_error
from hueshift.kernels.lag_mask import attention_share, binarise, lag_mask, share_launch, share_reference
from hueshift.kernels.launch_table import LaunchConfig, architecture, candidates

KERNEL = "lag_mask"
DTYPE = torch.float16
BATCH = 8
KEYS = 77
HEADS = {"sd15": 8}
# SDXL's heads are 64 wide; SD1.5 has eight, whatever the width.
HEAD_WIDTH = 64


class Blocks:
    """Queries and keys of all cross-attention blocks, stored with heads side by side as linear layers leave them."""

    def __init__(self, model: str, weights: Sequence[Weight], device: torch.device) -> None:
        """Allocate for BATCH conditional rows."""
        self.chosen = torch.zeros(BATCH, KEYS, device=device)
        self.chosen[:, 4:6] = 1
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.flops = self.bytes = 0.0
        for weight in weights:
            positions = weight.input[0]
            heads = HEADS.get(model, weight.rows // HEAD_WIDTH)
            width = weight.rows // heads
            q = torch.randn(BATCH, positions, heads, width, device=device, dtype=DTYPE).transpose(1, 2)
            k = torch.randn(BATCH, KEYS, heads, width, device=device, dtype=DTYPE).transpose(1, 2)
            self.calls.append((q, k))
            self.flops += 2.0 * BATCH * positions * KEYS * weight.rows
            self.bytes += 2.0 * (q.numel() + k.numel()) + 12.0 * BATCH * positions

    def run(self) -> None:
        """Make every mask with the launch table's choices."""
        for q, k in self.calls:
            lag_mask(q, k, self.chosen, q.shape[3] ** -0.5)

    def share(self, q: Tensor, k: Tensor, config: LaunchConfig | None) -> Tensor:
        """Return one block's shares, with the launch table's choice or with `config`."""
        scale = q.shape[3] ** -0.5
        if config is None:
            return attention_share(q, k, self.chosen, scale)
        share = torch.empty(q.shape[0], q.shape[2], device=q.device)
        share_launch(share, q, k, self.chosen, scale, config).run()
        return share

    def run_with(self, config: LaunchConfig) -> None:
        """Make every mask with `config`."""
        for q, k in self.calls:
            binarise(self.share(q, k, config))

    def run_torch(self) -> None:
        """Make every mask through the full probabilities."""
        chosen = self.chosen.to(DTYPE)[:, None, :, None]
        for q, k in self.calls:
            # The scale goes onto the queries, which are fewer numbers than the probabilities.
            probability = torch.softmax((q * q.shape[3] ** -0.5) @ k.transpose(2, 3), dim=-1)
            share = (probability @ chosen)[..., 0].float().mean(1)
            middle = share.shape[1] // 2
            (share >= share.sort(dim=1).values[:, middle : middle + 1]).float()

    def check(self, config: LaunchConfig | None) -> float:
        """Return the largest error of the shares against float64, and infinity where a median is not exact."""
        worst = 0.0
        for q, k in self.calls[::4]:
            share = self.share(q, k, config)
            want = share_reference(q.double(), k.double(), self.chosen.double(), q.shape[3] ** -0.5)
            exact = torch.equal(binarise(share).cpu(), binarise(share.cpu()))
            worst = max(worst, relative_error(share, want) if exact else float("inf"))
        return worst


def cases(models: Mapping[str, Sequence[Weight]], device: torch.device, sweep: bool) -> Iterator[Case]:
    """Yield one case a model; with `sweep`, each model under every launch configuration."""
    configs: list[LaunchConfig | None] = [*candidates(architecture(device), KERNEL)] if sweep else [None]
    for model, every in models.items():
        blocks = Blocks(model, [weight for weight in every if weight.name.endswith("attn2.to_q")], device)
        for number, config in enumerate(configs):
            yield Case(
                case=f"{model}-{number}" if sweep else model,
                works=[blocks.run if config is None else partial(blocks.run_with, config)],
                baseline="softmax, product and sort per block",
                baselines=[blocks.run_torch],
                flops=blocks.flops,
                bytes=blocks.bytes,
                floor_ms=floor_ms(blocks.flops, blocks.bytes),
                check=partial(blocks.check, config),
                tolerance=1e-3,
                details={"batch": BATCH, "config": None if config is None else asdict(config)},
            )
