"""What the step loop knows of a UNet engine: rows go into slots, and one call denoises a mixed batch.

A slot holds one adapter mix. Slot 0 is the base model and never changes. Loading a row is a copy into memory that the
engine already owns: the compiled graph takes the slabs as inputs, so nothing is rebuilt, and the slots of running
samples stay as they are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

BASE_SLOT = 0


class Plan(StrEnum):
    """How adapter rows reach the UNet in one call."""

    DENSE = "dense"
    """Shared weights plus a per-sample low-rank branch: y = Wx + B_i(A_i x)."""

    FACTORED = "factored"
    """Weights as their SVD with per-sample singular values, plus that branch: y = U(s_i * V^T x) + B_i(A_i x)."""

    FULL = "full"
    """The factored plan with what single samples may ask of attention: see Guides."""

    MERGED = "merged"
    """One adapter mix written into a copy of the weights: the base's speed, for calls whose rows share one slot."""


SLAB_PLANS = (Plan.DENSE, Plan.FACTORED, Plan.FULL)
"""The plans that read adapter rows from slabs, so that a call mixes any slots."""


@dataclass(frozen=True, slots=True, eq=False)
class Guides:
    """What Plan.FULL does beside the factored plan, by UNet row; rows that ask for nothing are not changed by it.

    `lag` [N, tokens] fp32 is 1 at the tokens whose attention confines a row's low-rank branch (LAG sampling, Ham et
    al. 2024), and `lag_source` [N] int64 the row whose tokens and attention decide: a row without guidance, and the
    negative row of a picture, name the row of its prompt. A row of zeros confines nothing.
    `reference` [N] int64 is the row whose self-attention a row shares (StyleAligned, Hertz et al. 2023); itself: none.
    """

    lag: Tensor
    lag_source: Tensor
    reference: Tensor


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One adapter mix as an engine reads it: flat fp32 vectors, and whole deltas where it has any.

    `spectral` [spectral_size] holds *effective* values, relu(sigma + delta) for each matrix and w + shift for each
    norm; None means the base's own. `lowrank` [lowrank_size] holds A and B of every target with scale and weight
    folded into B; None means zeros. The layout of both is `engines.rows.RowLayout`. `dense` has deltas [rows, cols] of
    weight matrices by layer with weights folded in, any float dtype; layers that are missing are unchanged. None means
    none: most mixes have none, and one that has runs under Plan.MERGED alone (see WholeWeightEngine).
    """

    spectral: Tensor | None = None
    lowrank: Tensor | None = None
    dense: Mapping[str, Tensor] | None = None

    @property
    def needs_factored(self) -> bool:
        """True if only the factored plan can run this row."""
        return self.spectral is not None

    @property
    def needs_weights(self) -> bool:
        """True if it takes weights of its own."""
        return self.dense is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """All of them."""
        yield from (part for part in (self.spectral, self.lowrank) if part is not None)
        yield from (self.dense or {}).values()

    def each(self, change: Callable[[Tensor], Tensor]) -> "EngineRow":
        """The same with every tensor changed: moved, copied, page-locked."""
        spectral, lowrank = (None if part is None else change(part) for part in (self.spectral, self.lowrank))
        dense = None if self.dense is None else {name: change(delta) for name, delta in self.dense.items()}
        return EngineRow(spectral, lowrank, dense)


def no_guides(cross: Tensor) -> Guides:
    """Guides that ask for nothing, for the rows of `cross` [N, tokens, width]."""
    own = torch.arange(cross.shape[0], device=cross.device)
    return Guides(torch.zeros(cross.shape[:2], device=cross.device), own, own)


class UNetEngine(Protocol):
    """A UNet that denoises mixed batches. One thread calls `denoise` and `load_row`; they are not safe to overlap."""

    @property
    def name(self) -> str:
        """`torch` or `onnxruntime`: bounded, used as a metric label."""
        ...

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Plans it can run."""
        ...

    @property
    def slots(self) -> int:
        """Slots in all, the base's own included."""
        ...

    @property
    def max_batch(self) -> int:
        """Largest number of UNet rows in one call (a guided picture is two rows)."""
        ...

    def load_row(self, slot: int, row: EngineRow) -> None:
        """Copy a row into a slot other than BASE_SLOT.

        Raises InvalidArgument on a wrong size, dtype or slot.
        """
        ...

    def denoise(
        self,
        plan: Plan,
        latents: Tensor,
        timesteps: Tensor,
        cross: Tensor,
        adapter_index: Tensor,
        added: Tensor | None = None,
    ) -> Tensor:
        """Run the UNet once.

        latents [N, 4, h, w] fp32, timesteps [N] fp32, cross [N, tokens, width] (keys and values of every
        cross-attention, as engines.cross_attention.CrossStage makes them), adapter_index [N] int64 (slots), and for
        SDXL added [N, width] (engines.added_embedding.AddedStage); other models ignore it. Those two are fp32, or in
        the engine's own dtype.
        Returns the model's output [N, 4, h, w] fp32 (epsilon or v, as the base was trained). Under Plan.DENSE only the
        low-rank part of a row counts: the caller must not send rows that need the factored plan. Plan.FULL runs with
        guides that ask for nothing.
        """
        ...

    def denoise_guided(
        self,
        latents: Tensor,
        timesteps: Tensor,
        cross: Tensor,
        adapter_index: Tensor,
        guides: Guides,
        added: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run Plan.FULL once, which must be one of `plans`.

        Also returns the share of transformers whose branches acted at each position, [N, h, w] fp32: the LAG masks,
        averaged over the UNet at the latents' resolution; ones for a row that is not confined.
        """
        ...

    def warm(self) -> None:
        """Run every plan once, so that the first request pays for nothing."""
        ...


@runtime_checkable
class MeasuredEngine(Protocol):
    """An engine that fills its calls up and knows what fits in its device's memory."""

    @property
    def buckets(self) -> Sequence[int]:
        """Rows that calls are filled up to; empty if calls take any number."""
        ...

    @property
    def capacity(self) -> Mapping[tuple[int, int], int]:
        """UNet rows of one call that fit, by latent size (h, w); empty if that was not measured."""
        ...


@runtime_checkable
class RunsAhead(Protocol):
    """An engine whose calls return before its device has done them."""

    @property
    def working(self) -> bool:
        """True while the device still has calls to do."""
        ...


@runtime_checkable
class MergingEngine(UNetEngine, Protocol):
    """An engine with Plan.MERGED: it holds the weights of a few slots' mixes beside the base's."""

    @property
    def weight_slots(self) -> int:
        """Mixes whose weights it holds at a time; 0: Plan.MERGED is not among `plans`."""
        ...

    @property
    def merged(self) -> frozenset[int]:
        """Slots whose weights are written, for the rows that the slots hold now. BASE_SLOT is always one."""
        ...

    @property
    def merging(self) -> frozenset[int]:
        """Slots whose weights are being written."""
        ...

    def merge(self, slot: int) -> None:
        """Begin to write a slot's weights, beside the steps that run; `merged` has it once it is done.

        The least recently used of the other mixes makes room; a slot that is written already counts as used. Raises
        InvalidArgument on a slot that does not exist.
        """
        ...


@runtime_checkable
class WholeWeightEngine(Protocol):
    """An engine that serves mixes with dense deltas, each from weights of its own.

    Rows of such a slot run under Plan.MERGED, which then need not be among `plans`, in calls that name no other slot.
    """

    @property
    def dense_slots(self) -> int:
        """Such mixes it holds at a time; 0: it serves none."""
        ...

    @property
    def dense(self) -> frozenset[int]:
        """Slots that hold one now."""
        ...


def dense_slots(engine: UNetEngine) -> int:
    """Mixes with dense deltas that any engine holds at a time."""
    return engine.dense_slots if isinstance(engine, WholeWeightEngine) else 0


def dense_in(engine: UNetEngine) -> frozenset[int]:
    """Slots of any engine that hold such a mix."""
    return engine.dense if isinstance(engine, WholeWeightEngine) else frozenset()
