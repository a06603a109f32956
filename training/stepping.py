"""From one batch to its gradients: what the UNet is given, who runs it, and the optimiser step behind it.

A job makes of each batch a `StepWork`: numbers that still lie on the host, and how its rows and contexts come from its
values. A `Stepper` takes it from there, all on the device: for the job alone here, for several jobs at once in
training/sharing. On the way nothing on the device is looked at, so the host is steps ahead of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hueshift.engines.transfer import to_device
from hueshift.training.divergence import check_finite
from hueshift.training.methods.learnable import Rows
from hueshift.training.objectives.denoising import denoising_loss
from hueshift.training.precision import mixed_precision
from hueshift.training.spec import Precision
from hueshift.training.state import TrainingState, update_together
from hueshift.training.unet import Maps, TrainingUNet
from hueshift.training.words import Wording


@dataclass(frozen=True, slots=True, eq=False)
class StepWork:
    """One batch of one job, for a UNet on `device`.

    On the host: `noisy` and `target` [n, 4, h, w], `timesteps` [n] int64, `weights` [n], `pixel_weights` [n, 1, h, w]
    or None, and `anchored` [m] int64, rows whose target is the base's output instead.

    `rows`, `base_rows` and `context` [n, tokens, width] are made on the device when they are asked for; `wording` is
    what `context` would encode, None if nobody else can. `watched` are names of cross-attentions, `halves` the rows
    whose maps are wanted, and `added` makes of those what the objectives add to the loss.
    """

    device: torch.device
    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    weights: Tensor
    pixel_weights: Tensor | None
    anchored: Tensor
    rows: Callable[[], Rows]
    base_rows: Callable[[], Rows]
    context: Callable[[], Tensor]
    wording: Callable[[], Wording | None]
    watched: frozenset[str]
    halves: tuple[int, ...]
    added: Callable[[Maps], Sequence[Tensor]]
    precision: Precision


@dataclass(frozen=True, slots=True)
class Turn:
    """Batch `number` of the `count` whose gradients one step averages.

    `before_update` is called once in a step, when its gradients are there and its values have not moved; in company,
    before the last batch is handed in.
    """

    number: int
    count: int
    before_update: Callable[[], None]

    @property
    def first(self) -> bool:
        """True if gradients of an earlier step go."""
        return self.number == 0

    @property
    def last(self) -> bool:
        """True if the optimiser's step follows."""
        return self.number == self.count - 1


class Stepper(Protocol):
    """Takes the batches of one job."""

    def step(self, unet: TrainingUNet, work: StepWork, state: TrainingState, turn: Turn) -> Tensor:
        """Add the gradients of loss / count to the state's, or update it with the last of a step.

        Returns the loss, a detached scalar on the device. On the CPU, where looking costs nothing, raises HueshiftError
        (TRAINING_DIVERGED) when it is no finite number, and nothing was updated then; elsewhere `arrived` tells.
        """
        ...

    def leave(self) -> None:
        """Tell that no step follows soon: the job ends, or does something else. The next `step` takes it back."""
        ...


class StepAlone:
    """A job with the UNet to itself."""

    def step(self, unet: TrainingUNet, work: StepWork, state: TrainingState, turn: Turn) -> Tensor:
        """One graph from the job's values to the loss."""
        loss = work_loss(unet, work)
        if work.device.type == "cpu":
            check_finite(loss.detach(), state.step + 1, "loss")
        state.backward(loss / turn.count, first=turn.first)
        if turn.last:
            turn.before_update()
            update_together([state])
        return loss.detach()

    def leave(self) -> None:
        """Do nothing: nobody waits."""


def work_loss(unet: TrainingUNet, work: StepWork) -> Tensor:
    """Run the UNet for one work; the scalar loss is differentiable with respect to the job's values."""
    context, rows = work.context(), work.rows()
    noisy, timesteps = to_device(work.noisy, work.device), to_device(work.timesteps, work.device)
    with mixed_precision(work.device, work.precision):
        with unet.watching(work.watched, work.halves) as maps:
            output = unet(noisy, timesteps, context, rows)
        target = aims(unet, [work], noisy, timesteps, context)
    weights = to_device(work.weights, work.device)
    pixels = None if work.pixel_weights is None else to_device(work.pixel_weights, work.device)
    return with_added(denoising_loss(target, weights, output, pixels), work, maps)


def aims(unet: TrainingUNet, works: Sequence[StepWork], noisy: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
    """What the rows of all works, one after the other, aim at [n, 4, h, w]: the base's output at those anchored."""
    device = works[0].device
    target = to_device(joined([work.target for work in works]), device)
    anchored, begin = [], 0
    for work in works:
        anchored.append(work.anchored + begin)
        begin += len(work.noisy)
    rows = joined(anchored)
    if len(rows) == 0:
        return target
    chosen = to_device(rows, device)
    # The rows of the base are the same whichever of the works they come from.
    base_rows = next(work for work in works if len(work.anchored)).base_rows()
    with torch.no_grad():
        base = unet(noisy[chosen], timesteps[chosen], context[chosen], base_rows)
    return target.index_copy(0, chosen, base.float())


def with_added(loss: Tensor, work: StepWork, maps: Maps) -> Tensor:
    """The loss of a work with what its objectives add."""
    for added in work.added(maps):
        loss = loss + added
    return loss


def joined(parts: Sequence[Tensor]) -> Tensor:
    """One after the other; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
