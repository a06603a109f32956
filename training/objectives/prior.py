"""Prior preservation (Ruiz et al. 2023): class pictures that the base drew keep what it knew of the class."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hueshift.training.objectives.denoising import draw_timesteps
from hueshift.training.objectives.objective import Batch, Draws, Objective


@dataclass(frozen=True, slots=True, eq=False)
class ClassPictures:
    """Latents [n, 4, h, w] of the base's own pictures of `prompt`, which names `noun`."""

    latents: Tensor
    prompt: str
    noun: str = ""


class PriorPreservation(Objective):
    """Adds as many class pictures as there are rows; their mean error counts `weight` (lambda) times.

    With several classes their pictures are taken from all of them alike.
    """

    def __init__(self, classes: Sequence[ClassPictures], weight: float, train_steps: int, anchor_below: int) -> None:
        self._latents = torch.cat([pictures.latents for pictures in classes])
        self._prompts = [pictures.prompt for pictures in classes for _ in range(len(pictures.latents))]
        self._weight, self._train_steps, self._anchor_below = weight, train_steps, anchor_below

    def rows(self, batch: Batch, draws: Draws) -> Batch:
        """Append the class pictures, with timesteps of their own."""
        count = len(batch.captions)
        taken = draws.take("class", count, len(self._prompts))
        timesteps = draw_timesteps(count, self._train_steps, self._anchor_below, draws.generator)
        return replace(
            batch,
            clean=torch.cat([batch.clean, self._latents[taken]]),
            timesteps=torch.cat([batch.timesteps, timesteps]),
            weights=torch.cat([batch.weights, torch.full((count,), self._weight / count)]),
            captions=batch.captions + tuple(self._prompts[i] for i in taken.tolist()),
            pictures=torch.cat([batch.pictures, torch.full((count,), -1)]),
        )
