"""One optimiser step, from drawing the batch to updating the tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hueshift.engines.noise_schedule import NoiseSchedule
from hueshift.training.latents import PictureSet
from hueshift.training.methods.learnable import Learnable
from hueshift.training.objectives.denoising import draw_timesteps
from hueshift.training.objectives.objective import Batch, Objective
from hueshift.training.spec import TrainingSpec
from hueshift.training.state import TrainingState
from hueshift.training.stepping import StepAlone, Stepper, StepWork, Turn, work_loss
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
    """Draw the rows of one step, on the host: pictures, then what the objectives make of them."""
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


def make_work(task: TrainingTask, values: Mapping[str, Tensor], batch: Batch) -> StepWork:
    """What the UNet is given for a batch, differentiable with respect to `values`, and what its output is held to."""
    device, learnable, captions = task.device, task.learnable, task.captions
    sizes = task.pictures.sizes_of(batch.pictures)

    def added(maps: Maps) -> list[Tensor]:
        found = (objective.loss(batch, maps) for objective in task.objectives)
        return [loss for loss in found if loss is not None]

    return StepWork(
        device=device,
        noisy=task.schedule.add_noise(batch.clean, batch.noise, batch.timesteps),
        timesteps=batch.timesteps,
        target=task.schedule.target(batch.clean, batch.noise, batch.timesteps),
        weights=batch.weights,
        pixel_weights=batch.pixel_weights,
        anchored=(batch.timesteps < task.spec.anchor_below).nonzero().flatten(),
        rows=lambda: learnable.rows(values).to(device),
        base_rows=lambda: learnable.base_rows().to(device),
        context=lambda: captions.contexts(batch.captions, values, sizes).to(device),
        wording=lambda: captions.wording(batch.captions, values, sizes),
        watched=frozenset(name for objective in task.objectives for name in objective.watched),
        halves=tuple(sorted(batch.halves)),
        added=added,
        precision=task.spec.precision,
    )


def batch_loss(task: TrainingTask, values: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """Loss of one batch as a scalar, differentiable with respect to `values`."""
    return work_loss(task.unet, make_work(task, values, batch))


def train_step(task: TrainingTask, state: TrainingState, failpoint: Callable[[str], None]) -> None:
    """Take one step, of as many batches as the job accumulates; `arrived` of the state tells its mean loss.

    On the CPU raises HueshiftError (TRAINING_DIVERGED) when the loss is no finite number; nothing was updated then.
    """
    count = task.spec.gradient_accumulation
    losses: list[Tensor] = []
    for number in range(count):
        work = make_work(task, state.values, draw_batch(task, state))
        turn = Turn(number, count, lambda: failpoint("mid-step"))
        losses.append(task.stepper.step(task.unet, work, state, turn))
    state.count(losses)
