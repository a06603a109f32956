"""One optimiser step, from drawing the batch to updating the tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hueshift.adapters.errors import HueshiftError, Reason
from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.noise_schedule import NoiseSchedule
from hueshift.training.identifier import Captions
from hueshift.training.latents import PictureLatents
from hueshift.training.objective import Batch, denoising_loss, draw_timesteps, row_weights, snr_weights
from hueshift.training.parameters import Learnable, Rows
from hueshift.training.precision import mixed_precision
from hueshift.training.spec import TrainingSpec
from hueshift.training.state import IDENTIFIER, TrainingState


@dataclass(frozen=True, slots=True, eq=False)
class ClassPictures:
    """What the prior-preservation loss compares with: latents [n, 4, h, w] of the base's own pictures of `prompt`."""

    latents: Tensor
    prompt: str


@dataclass(frozen=True, slots=True, eq=False)
class TrainingTask:
    """What a run trains on and with; nothing in it changes. `subjects` has a caption for each of `pictures`."""

    spec: TrainingSpec
    schedule: NoiseSchedule
    unet: AdaptedUNet
    learnable: Learnable
    captions: Captions
    pictures: PictureLatents
    subjects: Sequence[str]
    class_pictures: ClassPictures | None
    device: torch.device

    def rows_of(self, rows: Rows) -> Rows:
        """Put rows on the UNet's device."""
        spectral, lowrank = (None if row is None else row.to(self.device) for row in rows)
        return spectral, lowrank


def draw_batch(task: TrainingTask, state: TrainingState) -> tuple[Batch, list[str]]:
    """Draw the rows of one step, pictures first and then class pictures, and the caption of each."""
    spec, generator, steps = task.spec, state.generator, task.schedule.train_steps
    chosen = state.take(spec.batch_size, len(task.pictures))
    clean = task.pictures.draw(chosen, generator)
    kept = torch.rand(spec.batch_size, generator=generator) >= spec.caption_dropout
    captions = [task.subjects[i] if keep else "" for i, keep in zip(chosen.tolist(), kept.tolist(), strict=True)]
    timesteps = draw_timesteps(spec.batch_size, steps, spec.anchor_below, generator)
    class_rows = 0
    if task.class_pictures is not None:
        class_rows = spec.batch_size
        remembered = state.take(class_rows, len(task.class_pictures.latents), of_class=True)
        clean = torch.cat([clean, task.class_pictures.latents[remembered]])
        captions += [task.class_pictures.prompt] * class_rows
        timesteps = torch.cat([timesteps, draw_timesteps(class_rows, steps, spec.anchor_below, generator)])
    weights = row_weights(spec.batch_size, class_rows, spec.prior_weight)
    weights = weights * snr_weights(task.schedule, timesteps, spec.min_snr_gamma)
    return Batch(clean, torch.randn(clean.shape, generator=generator), timesteps, weights), captions


def batch_loss(task: TrainingTask, values: dict[str, Tensor], batch: Batch, captions: Sequence[str]) -> Tensor:
    """Loss of one batch as a scalar, differentiable with respect to `values`."""
    device = task.device
    context = task.captions.contexts(captions, values.get(IDENTIFIER)).to(device)
    spectral, lowrank = task.rows_of(task.learnable.rows(values))
    noisy = task.schedule.add_noise(batch.clean, batch.noise, batch.timesteps).to(device)
    timesteps = batch.timesteps.to(device)
    target = task.schedule.target(batch.clean, batch.noise, batch.timesteps).to(device)
    anchored = timesteps < task.spec.anchor_below
    with mixed_precision(device):
        output = task.unet.forward_rows(noisy, timesteps, context, spectral, lowrank)
        if bool(anchored.any()):
            with torch.no_grad():
                base_rows = task.rows_of(task.learnable.base_rows())
                base = task.unet.forward_rows(noisy[anchored], timesteps[anchored], context[anchored], *base_rows)
            target[anchored] = base.float()
    return denoising_loss(target, batch.weights.to(device), output)


def train_step(task: TrainingTask, state: TrainingState, failpoint: Callable[[str], None]) -> float:
    """Take one step and return its loss.

    Raises HueshiftError (TRAINING_DIVERGED) when the loss is no finite number; nothing was updated then.
    """
    batch, captions = draw_batch(task, state)
    loss = batch_loss(task, state.values, batch, captions)
    value = loss.item()
    check_finite(loss.detach(), state.step + 1, "loss")
    state.backward(loss)
    failpoint("mid-step")
    state.update(value)
    return value


def check_finite(tensor: Tensor, step: int, what: str) -> None:
    """Raise HueshiftError (TRAINING_DIVERGED) naming the step if `tensor` holds a value that is not finite."""
    if not bool(torch.isfinite(tensor).all()):
        raise HueshiftError(
            Reason.TRAINING_DIVERGED,
            f"training diverged: the {what} was not finite at step {step}; lower settings.learning_rate",
            metadata={"step": str(step)},
        )
