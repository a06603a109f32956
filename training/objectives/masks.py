"""Subject masks: the loss looks at the subject, not at what happens to stand around it (Avrahami et al. 2023)."""

from dataclasses import replace

import torch
from torch import Tensor

from hueshift.training.objectives.objective import Batch, Draws, Objective


class SubjectMasks(Objective):
    """Weighs positions by the mask of the picture they show.

    `masks` [n, 1, h, w] and `half_masks` [n, 1, h, w/2] are 0 to 1 for each picture, ones where none was given; the
    second are needed for cut rows only. Outside of a mask positions weigh `background`.
    """

    def __init__(self, masks: Tensor, half_masks: Tensor | None, background: float) -> None:
        self._masks, self._half_masks, self._background = masks, half_masks, background

    def rows(self, batch: Batch, draws: Draws) -> Batch:
        """Give every row its mask; rows that show no picture of the job count everywhere."""
        masks = [self._masks[i] if i >= 0 else torch.ones_like(self._masks[0]) for i in batch.pictures.tolist()]
        for row, halves in batch.halves.items():
            if self._half_masks is not None and halves.pictures is not None:
                left, right = halves.pictures
                masks[row] = torch.cat([self._half_masks[left], self._half_masks[right]], dim=-1)
        return replace(batch, pixel_weights=self._background + (1 - self._background) * torch.stack(masks))
