"""One optimiser step, from drawing the batch to updating the tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hueshift.adapters.errors import HueshiftError, Reason
from hueshift.engines.noise_schedule import NoiseSchedule
from hueshift.training.latents import PictureSet
from hueshift.training.methods.learnable import Learnable
from hueshift.training.objectives.denoising import denoising_loss, draw_timesteps
from hueshift.training.objectives.objective import Batch, Objective
from hueshift.training.spec import TrainingSpec
from hueshift.training.state import TrainingState
from hueshift.training.stepping import StepAlone, Stepper, StepWork, work_loss
from hueshift.training.unet import Maps, TrainingUNet
from hueshift.training.words import Captions


@dataclass(frozen=True, slots=True, eq=False)
class TrainingTask:
    """What a run trains on and with; nothing in it changes."""

    spec: TrainingSpec
    schedule: NoiseSchedule
    unet: TrainingUNet
    learnable: Learnable
    captions: Captions
    pictures: PictureSet
    objectives: Sequence[Objective]
    device: torch.device
    stepper: Stepper = field(default_factory=StepAlone)


def draw_batch(task: TrainingTask, state: TrainingState) -> Batch:
    """Draw the rows of one step: pictures, then what the objectives make of them."""
    spec, draws, pictures = task.spec, state.draws, task.pictures
    chosen = pictures.turns[draws.take("pictures", spec.batch_size, len(pictures.turns))]
    clean = pictures.latents.draw(chosen, draws.generator)
    kept = torch.rand(spec.batch_size, generator=draws.generator) >= spec.caption_dropout
    captions = (pictures.captions[i] if keep else "" for i, keep in zip(chosen.tolist(), kept.tolist(), strict=True))
    timesteps = draw_timesteps(spec.batch_size, task.schedule.train_steps, spec.anchor_below, draws.generator)
    weights = torch.full((spec.batch_size,), 1 / spec.batch_size)
    batch = Batch(clean, torch.zeros(0), timesteps, weights, tuple(captions), chosen)
    for objective in task.objectives:
        batch = objective.rows(batch, draws)
    batch = replace(batch, noise=torch.randn(batch.clean.shape, generator=draws.generator))
    for objective in task.objectives:
        batch = objective.noised(batch, draws)
    return batch


def make_work(task: TrainingTask, values: dict[str, Tensor], batch: Batch) -> StepWork:
    """What the UNet is given for a batch, differentiable with respect to `values`, and the loss of what comes out."""
    device = task.device
    context = task.captions.contexts(batch.captions, values).to(device)
    target = task.schedule.target(batch.clean, batch.noise, batch.timesteps).to(device)
    # Found before anything is moved: looking at a device's numbers waits for it.
    marked = (batch.timesteps < task.spec.anchor_below).nonzero().flatten()
    anchored = marked.to(device)

    def loss_of(output: Tensor, base: Tensor | None, maps: Maps) -> Tensor:
        aims = target if base is None else target.index_copy(0, anchored, base.float())
        pixel_weights = None if batch.pixel_weights is None else batch.pixel_weights.to(device)
        loss = denoising_loss(aims, batch.weights.to(device), output, pixel_weights)
        for objective in task.objectives:
            if (added := objective.loss(batch, maps)) is not None:
                loss = loss + added
        return loss

    return StepWork(
        noisy=task.schedule.add_noise(batch.clean, batch.noise, batch.timesteps).to(device),
        timesteps=batch.timesteps.to(device),
        context=context,
        rows=task.learnable.rows(values).to(device),
        anchored=anchored,
        base_rows=task.learnable.base_rows().to(device) if len(marked) else None,
        watched=frozenset(name for objective in task.objectives for name in objective.watched),
        halves=tuple(sorted(batch.halves)),
        precision=task.spec.precision,
        loss_of=loss_of,
    )


def batch_loss(task: TrainingTask, values: dict[str, Tensor], batch: Batch) -> Tensor:
    """Loss of one batch as a scalar, differentiable with respect to `values`."""
    return work_loss(task.unet, make_work(task, values, batch))


def train_step(task: TrainingTask, state: TrainingState, failpoint: Callable[[str], None]) -> float:
    """Take one step, of as many batches as the job accumulates, and return their mean loss.

    Raises HueshiftError (TRAINING_DIVERGED) when the loss is no finite number; nothing was updated then.
    """
    count = task.spec.gradient_accumulation
    total = 0.0
    for number in range(count):
        work = make_work(task, state.values, draw_batch(task, state))
        stepped = task.stepper.step(task.unet, work, count)
        check_finite(stepped.loss, state.step + 1, "loss")
        total += stepped.loss.item()
        state.backward(stepped.roots, stepped.gradients, first=number == 0)
    failpoint("mid-step")
    state.update(total / count)
    return total / count


def check_finite(tensor: Tensor, step: int, what: str) -> None:
    """Raise HueshiftError (TRAINING_DIVERGED) naming the step if `tensor` holds a value that is not finite."""
    if not bool(torch.isfinite(tensor).all()):
        raise HueshiftError(
            Reason.TRAINING_DIVERGED,
            f"training diverged: the {what} was not finite at step {step}; lower settings.learning_rate",
            metadata={"step": str(step)},
        )
