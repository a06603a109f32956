"""From one batch to its gradients: what the UNet is given, and who runs it.

A job makes its rows and its contexts in a graph of its own. Everything after them, the UNet and the loss, is a
`StepWork`, which a `Stepper` turns into gradients: for the job alone here, for several jobs at once in
training/sharing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hueshift.training.methods.learnable import Rows
from hueshift.training.precision import mixed_precision
from hueshift.training.spec import Precision
from hueshift.training.unet import Maps, TrainingUNet

LossOf = Callable[[Tensor, Tensor | None, Maps], Tensor]
"""(output [n, 4, h, w], the base's output at the anchored rows or None, attention maps) -> scalar loss."""


@dataclass(frozen=True, slots=True, eq=False)
class StepWork:
    """One batch of one job, on the UNet's device.

    `noisy` [n, 4, h, w], `timesteps` [n], `context` [n, tokens, width] and `rows`, of which context and rows may need
    gradients. At the `anchored` rows [m] int64 the base's output is wanted too, with `base_rows`; those are None if no
    row is anchored. `watched` are names of cross-attentions, `halves` the rows whose maps are wanted.
    """

    noisy: Tensor
    timesteps: Tensor
    context: Tensor
    rows: Rows
    anchored: Tensor
    base_rows: Rows | None
    watched: frozenset[str]
    halves: tuple[int, ...]
    precision: Precision
    loss_of: LossOf


@dataclass(frozen=True, slots=True, eq=False)
class Stepped:
    """The loss of a work, a detached scalar, and where the job's own backward pass begins.

    `roots` are tensors of the job's graph and `gradients` those of the loss with respect to them, None for a root that
    is the scalar loss. Both are empty if nothing needs a gradient, and may be if the loss is no finite number.
    """

    loss: Tensor
    roots: tuple[Tensor, ...] = ()
    gradients: tuple[Tensor | None, ...] = ()


class Stepper(Protocol):
    """Runs the UNet for one job."""

    def step(self, unet: TrainingUNet, work: StepWork, count: int) -> Stepped:
        """Return the loss of `work` and the gradients of loss / count."""
        ...

    def leave(self) -> None:
        """Tell that no step follows soon: the job ends, or does something else. The next `step` takes it back."""
        ...


class StepAlone:
    """A job with the UNet to itself."""

    def step(self, unet: TrainingUNet, work: StepWork, count: int) -> Stepped:
        """One graph from the job's values to the loss."""
        loss = work_loss(unet, work)
        if not loss.requires_grad:
            return Stepped(loss)
        return Stepped(loss.detach(), (loss / count,), (None,))

    def leave(self) -> None:
        """Do nothing: nobody waits."""


def work_loss(unet: TrainingUNet, work: StepWork) -> Tensor:
    """Run the UNet for one work; the scalar loss is differentiable with respect to its rows and its context."""
    with mixed_precision(work.noisy.device, work.precision):
        with unet.watching(work.watched, work.halves) as maps:
            output = unet(work.noisy, work.timesteps, work.context, work.rows)
        base = base_output(unet, [work])
    return work.loss_of(output, base, maps)


@torch.no_grad()
def base_output(unet: TrainingUNet, works: list[StepWork]) -> Tensor | None:
    """The base's output at the anchored rows of all works, one after the other; None if there are none.

    The rows of the base are the same whichever of the works they come from.
    """
    found = [work for work in works if work.base_rows is not None]
    if not found or found[0].base_rows is None:
        return None
    parts = [(work.noisy[work.anchored], work.timesteps[work.anchored], work.context[work.anchored]) for work in found]
    noisy, timesteps, context = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return unet(noisy, timesteps, context, found[0].base_rows)
