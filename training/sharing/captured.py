"""The middle of a step, from rows and contexts through the UNet to the loss and back, as one CUDA graph.

Eagerly a factored step of SD1.5 is some six thousand launches, which take the host longer than a batch of one or two
takes the device. Captured it is one. What comes before (words, rows, the base's output at anchored rows) and after (the
way back to the values, the optimiser) is a few hundred launches, and differs from job to job.

What is captured are torch's own launches, or kernels that torch.compile makes of them (training/sharing/compiled.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hueshift.engines.cuda_buffers import CallShape
from hueshift.engines.cuda_graphs import GraphKey, GraphStore
from hueshift.engines.cuda_lane import GraphLane
from hueshift.training.methods.learnable import Rows
from hueshift.training.precision import lowers_products, mixed_precision
from hueshift.training.sharing.compiled import Compiler, Errors, FallingBack, plain_errors
from hueshift.training.spec import Precision
from hueshift.training.stepping import StepWork
from hueshift.training.unet import TrainingUNet

# Batches of so many sizes keep their graphs: with eight jobs that come and go there are eight.
_MOST_GRAPHS = 8
_ROLES = {1: "training alone", 2: "training together"}


@dataclass(frozen=True, slots=True, eq=False)
class Middle:
    """What goes in: `noisy` and `target` [n, 4, h, w], `timesteps` [n], `weights` [n] of the errors whose sum goes
    back, `context` [n, tokens, width] and `rows`, one or n."""

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    weights: Tensor
    context: Tensor
    rows: Rows

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are wanted of."""
        return [part for part in (self.context, self.rows.spectral, self.rows.lowrank) if part is not None]


class _Memory:
    """A `Middle` that stays where it is, and what comes out."""

    def __init__(self, first: Middle) -> None:
        self.inputs = Middle(
            torch.empty_like(first.noisy),
            torch.empty_like(first.timesteps),
            torch.empty_like(first.target),
            torch.empty_like(first.weights),
            _leaf(first.context),
            Rows(_leaf_of(first.rows.spectral), _leaf_of(first.rows.lowrank)),
        )
        self.errors = torch.empty_like(first.weights)
        self.gradients = [torch.empty_like(leaf) for leaf in self.inputs.leaves]

    @torch.no_grad()
    def fill(self, given: Middle) -> None:
        """Copy a batch in."""
        inputs = self.inputs
        kept = [inputs.noisy, inputs.timesteps, inputs.target, inputs.weights, *inputs.leaves]
        parts = [given.noisy, given.timesteps, given.target, given.weights, *given.leaves]
        for place, part in zip(kept, parts, strict=True):
            place.copy_(part, non_blocking=True)


class CapturedSteps:
    """Runs middles of one UNet's steps on `lane`: the second time that a shape comes it is captured.

    With `compiler` each shape is compiled when it comes first. For one thread at a time, as the UNet itself.
    """

    def __init__(self, lane: GraphLane, compiler: Compiler | None = None) -> None:
        self._lane, self._compiler = lane, compiler
        self._compiled: FallingBack | None = None
        self._graphs = GraphStore(lane, limit=_MOST_GRAPHS)
        self._memory: dict[GraphKey, _Memory] = {}

    @property
    def captures(self) -> int:
        """Graphs captured so far."""
        return self._graphs.captures

    @staticmethod
    def fit(works: Sequence[StepWork], rows: Rows, context: Tensor) -> bool:
        """True if a graph can run these: no attention is looked at, no position weighed, and something is learned."""
        plain = all(not work.halves and work.pixel_weights is None for work in works)
        return plain and not rows.weights and any(part.requires_grad for part in (context, *_given(rows)))

    def run(self, unet: TrainingUNet, given: Middle, precision: Precision) -> tuple[Tensor, list[Tensor]]:
        """Mean squared error [n] of each row, and the gradients of their weighted sum at `given.leaves`.

        Both last until the next call. Contexts and rows of one UNet are of one width, whatever their number.
        """
        key = GraphKey(_ROLES[1 if _count(given.rows) <= 1 else 2], CallShape(*_sizes(given.noisy)))
        with self._lane.running():
            if key not in self._memory:
                self._memory[key] = _Memory(given)
            memory = self._memory[key]
            memory.fill(given)
            self._graphs.run(key, lambda: self._compute(unet, key, memory, precision))
            # What no graph reads goes with its graph, or before it has one: sizes come and go with the jobs.
            self._memory = {
                other: kept for other, kept in self._memory.items() if other == key or other in self._graphs
            }
        return memory.errors, memory.gradients

    def _compute(self, unet: TrainingUNet, key: GraphKey, memory: _Memory, precision: Precision) -> None:
        def compute(errors_of: Errors) -> None:
            _compute(errors_of, memory, precision)

        if self._compiler is None:
            compute(plain_errors(unet))
            return
        if self._compiled is None:
            self._compiled = FallingBack(unet, self._compiler)
        lowered = lowers_products(memory.errors.device, precision)
        self._compiled.run(key, compute, [memory.errors, *memory.gradients], lowered=lowered)


def _compute(errors_of: Errors, memory: _Memory, precision: Precision) -> None:
    inputs = memory.inputs
    with torch.enable_grad():
        # Entered and left in here: what autocast keeps for a while belongs to this call.
        with mixed_precision(inputs.noisy.device, precision):
            rows = inputs.rows
            errors = errors_of(
                inputs.noisy, inputs.timesteps, inputs.context, rows.spectral, rows.lowrank, inputs.target
            )
        found = torch.autograd.grad([(errors * inputs.weights).sum()], inputs.leaves)
    memory.errors.copy_(errors.detach())
    for kept, gradient in zip(memory.gradients, found, strict=True):
        kept.copy_(gradient)


def _leaf(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor.detach(), requires_grad=True)


def _leaf_of(row: Tensor | None) -> Tensor | None:
    return None if row is None else _leaf(row)


def _given(rows: Rows) -> list[Tensor]:
    return [row for row in (rows.spectral, rows.lowrank) if row is not None]


def _count(rows: Rows) -> int:
    return max((len(row) for row in _given(rows)), default=0)


def _sizes(noisy: Tensor) -> tuple[int, int, int]:
    return noisy.shape[0], noisy.shape[2], noisy.shape[3]
