"""When more steps bring nothing: the loss on noise that is always the same, asked now and then.

The loss of single steps jumps with their timesteps and noise, by more than a run lowers it. Here every check asks the
same questions, so that their answers can be compared. It is the pictures' own loss: what a job loses elsewhere (its
prior) it does not see, and with a learning rate that falls to zero it flattens anyway.
"""

import torch

from hueshift.engines.transfer import to_device
from hueshift.training.loop import TrainingTask
from hueshift.training.objectives.denoising import denoising_loss
from hueshift.training.precision import mixed_precision
from hueshift.training.state import TrainingState

# Steps between checks; each costs about as much as four steps' forward passes.
CHECK_INTERVAL = 10
# What a check must bring, as a share of the best loss so far.
LEAST_GAIN = 0.01
_TIMESTEPS = (200, 400, 600, 800)
_MAX_PICTURES = 8


@torch.no_grad()
def fixed_loss(task: TrainingTask, state: TrainingState) -> float:
    """Mean loss of the first pictures at four timesteps, with noise that is always the same, by the values so far.

    Waits for the device once.
    """
    values = dict(state.result)
    count = min(_MAX_PICTURES, len(task.pictures.latents))
    clean = task.pictures.latents.mean[:count]
    sizes = task.pictures.sizes_of(torch.arange(count))
    context = task.captions.contexts(task.pictures.captions[:count], values, sizes).to(task.device)
    rows = task.learnable.rows(values).to(task.device)
    generator = torch.Generator().manual_seed(task.spec.seed)
    losses: list[torch.Tensor] = []
    for thousandth in _TIMESTEPS:
        timesteps = torch.full((count,), thousandth * task.schedule.train_steps // 1000)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = to_device(task.schedule.add_noise(clean, noise, timesteps), task.device)
        target = to_device(task.schedule.target(clean, noise, timesteps), task.device)
        with mixed_precision(task.device, task.spec.precision):
            output = task.unet(noisy, to_device(timesteps, task.device), context, rows)
        losses.append(denoising_loss(target, torch.full((count,), 1 / count, device=task.device), output))
    # Read together: each look would wait for the device.
    return float(sum(torch.stack(losses).tolist())) / len(_TIMESTEPS)
