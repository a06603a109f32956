"""The memory that captured calls read and write: allocated once at the largest shape, viewed at every other.

Graphs hold addresses, so nothing here ever moves: a call copies its inputs in, replays, and copies the output out.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from hueshift.engines.interface import BASE_SLOT, Guides
from hueshift.engines.transfer import pinned_for

NO_BRANCH = -1
"""Branch index of a row that has none; the kernels leave such rows alone (kernels/adapter_index.py)."""


@dataclass(frozen=True, slots=True)
class CallShape:
    """What a graph is captured for: UNet rows (a bucket), and height and width of the latents."""

    rows: int
    height: int
    width: int

    @property
    def work(self) -> int:
        """Latent positions in all, by which captures are ordered: the largest first."""
        return self.rows * self.height * self.width


@dataclass(frozen=True, slots=True)
class CallViews:
    """The buffers at one shape. `sample` [N, C, h, w] lies channels_last in the engine's dtype, `timestep` [N] is fp32,
    `cross` [N, tokens, width] and `added` [N, width] (SDXL; else None) are in the engine's dtype, `slots` [N] and
    `branches` [N] int64, `out` [N, C, h, w] fp32. Plan.FULL reads `guides` too and writes `mask` [N, h, w] fp32.
    """

    sample: Tensor
    timestep: Tensor
    cross: Tensor
    added: Tensor | None
    slots: Tensor
    branches: Tensor
    guides: Guides
    out: Tensor
    mask: Tensor

    def fill(
        self,
        sample: Tensor,
        timestep: Tensor,
        cross: Tensor,
        added: Tensor | None,
        slots: Tensor,
        branches: Tensor,
    ) -> None:
        """Copy a call of at most N rows in. Rows beyond it run the base on what is left there; nobody reads them."""
        rows = sample.shape[0]
        self.sample[:rows].copy_(sample, non_blocking=True)
        self.timestep[:rows].copy_(timestep, non_blocking=True)
        self.cross[:rows].copy_(cross, non_blocking=True)
        if self.added is not None and added is not None:
            self.added[:rows].copy_(added, non_blocking=True)
        device = self.slots.device
        self.slots[:rows].copy_(pinned_for(slots, device), non_blocking=True)
        self.branches[:rows].copy_(pinned_for(branches, device), non_blocking=True)
        if rows < self.slots.shape[0]:
            self.slots[rows:].fill_(BASE_SLOT)
            self.branches[rows:].fill_(NO_BRANCH)

    def fill_guides(self, guides: Guides) -> None:
        """Copy the guides of at most N rows in. Rows beyond them ask for nothing, and none of these looks at them."""
        rows, device = guides.lag.shape[0], self.slots.device
        mine = self.guides
        for place, part in (
            (mine.lag, guides.lag),
            (mine.lag_source, guides.lag_source),
            (mine.reference, guides.reference),
        ):
            place[:rows].copy_(pinned_for(part, device), non_blocking=True)
        self.clear_guides(rows)

    def clear_guides(self, begin: int = 0) -> None:
        """Let rows from `begin` on ask for nothing.

        Also before a call without guides of its own: what an earlier and larger one left names rows that are not there.
        """
        count = self.slots.shape[0]
        if begin < count:
            own = torch.arange(begin, count, device=self.slots.device)
            self.guides.lag[begin:].zero_()
            self.guides.lag_source[begin:].copy_(own)
            self.guides.reference[begin:].copy_(own)


class CallBuffers:
    """Inputs and output of every captured call, at most `rows` rows of latents of `area` positions."""

    def __init__(
        self,
        *,
        rows: int,
        area: int,
        channels: int,
        cross: tuple[int, int],
        added: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.area = area
        self._channels = channels
        self._sample = zeros(rows * channels * area)
        self._out = zeros(rows * channels * area, dtype=torch.float32)
        self._timestep = zeros(rows, dtype=torch.float32)
        self._cross = zeros(rows, *cross)
        self._added = zeros(rows, added) if added else None
        self._slots = zeros(rows, dtype=torch.int64)
        self._branches = torch.full((rows,), NO_BRANCH, dtype=torch.int64, device=device)
        self._guides = Guides(
            zeros(rows, cross[0], dtype=torch.float32), zeros(rows, dtype=torch.int64), zeros(rows, dtype=torch.int64)
        )
        self._mask = zeros(rows * area, dtype=torch.float32)
        self._views: dict[CallShape, CallViews] = {}

    def at(self, shape: CallShape) -> CallViews:
        """The buffers at `shape`; the same views, and so the same addresses, every time."""
        views = self._views.get(shape)
        if views is None:
            views = self._views[shape] = self._make(shape)
        return views

    @property
    def addresses(self) -> dict[str, int]:
        """First address of each buffer, which must never change."""
        named = {name: getattr(self, f"_{name}") for name in ("sample", "out", "timestep", "cross", "slots", "mask")}
        named |= {name: getattr(self._guides, name) for name in ("lag", "lag_source", "reference")}
        return {name: tensor.data_ptr() for name, tensor in named.items()}

    def _make(self, shape: CallShape) -> CallViews:
        count, height, width = shape.rows, shape.height, shape.width
        lying = (count, height, width, self._channels)
        size, guides = prod(lying), self._guides
        return CallViews(
            sample=self._sample[:size].view(lying).permute(0, 3, 1, 2),
            timestep=self._timestep[:count],
            cross=self._cross[:count],
            added=None if self._added is None else self._added[:count],
            slots=self._slots[:count],
            branches=self._branches[:count],
            guides=Guides(*(part[:count] for part in (guides.lag, guides.lag_source, guides.reference))),
            out=self._out[:size].view(count, self._channels, height, width),
            mask=self._mask[: count * height * width].view(count, height, width),
        )


def buckets_up_to(largest: int) -> tuple[int, ...]:
    """Rows that calls are filled up to: powers of two and the numbers half way, so that at most a third is filling.

    A call of 10 rows costs what 12 cost, not what 16 do.
    """
    found = {1, largest}
    power = 2
    while power <= largest:
        found |= {power, power * 3 // 2}
        power *= 2
    return tuple(sorted(rows for rows in found if rows <= largest))


def bucket_for(rows: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds `rows`."""
    return next(bucket for bucket in buckets if bucket >= rows)
