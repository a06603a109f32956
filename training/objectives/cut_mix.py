"""Cut-Mix-Unmix (Han et al. 2023, section 3.3): two subjects side by side in one picture, told apart.

With a probability a row is replaced by the middle halves of two pictures, of two subjects, joined at the centre line,
under a caption that names both. Class pictures are cut in the same way. The unmix loss pushes the cross-attention of
each subject's word to zero over the other subject's half. The paper gives the probability (0.6) but neither the loss'
weight nor its layers where we could read it: both are settings here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hueshift.engines.transfer import to_device
from hueshift.training.latents import PictureLatents
from hueshift.training.objectives.objective import Batch, Draws, Halves, Objective
from hueshift.training.spec import Subject

Positions = Callable[[str, str], list[int]]
"""Positions of a word's tokens in an encoded caption: (caption, word) -> places."""


class CutMix(Objective):
    """Cuts rows. `subject_of` has the subject of each of `halves`, the latents [n, 4, h, w/2] of middle halves."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        halves: PictureLatents,
        subject_of: Sequence[int],
        classes: Mapping[str, Tensor],
        probability: float,
    ) -> None:
        self._subjects, self._halves, self._probability = subjects, halves, probability
        self._pictures = [[i for i, of in enumerate(subject_of) if of == subject] for subject in range(len(subjects))]
        # By class noun, the middle halves [n, 4, h, w/2] of the base's own pictures.
        self._classes = {noun: middle_half(latents) for noun, latents in classes.items()}

    def rows(self, batch: Batch, draws: Draws) -> Batch:
        """Replace some rows by cut ones; dropped captions stay dropped."""
        cut = torch.rand(len(batch.captions), generator=draws.generator) < self._probability
        clean, captions, pictures = batch.clean.clone(), list(batch.captions), batch.pictures.clone()
        halves = dict(batch.halves)
        for row in cut.nonzero().flatten().tolist():
            left, right = torch.randperm(len(self._subjects), generator=draws.generator)[:2].tolist()
            sides = bool(torch.rand((), generator=draws.generator) < 0.5)
            of_class = int(pictures[row]) < 0
            if of_class:
                shown = None
                clean[row] = torch.cat([self._class_half(left, draws), self._class_half(right, draws)], dim=-1)
            else:
                shown = (self._pick(left, draws), self._pick(right, draws))
                drawn = self._halves.draw(torch.tensor(shown), draws.generator)
                clean[row] = torch.cat([drawn[0], drawn[1]], dim=-1)
            if captions[row]:
                captions[row] = cut_caption(self._subjects[left], self._subjects[right], sides, of_class=of_class)
            halves[row] = Halves(left, right, shown)
            pictures[row] = -1
        return replace(batch, clean=clean, captions=tuple(captions), pictures=pictures, halves=halves)

    def _pick(self, subject: int, draws: Draws) -> int:
        pictures = self._pictures[subject]
        return pictures[int(torch.randint(len(pictures), (), generator=draws.generator))]

    def _class_half(self, subject: int, draws: Draws) -> Tensor:
        latents = self._classes[self._subjects[subject].class_noun]
        return latents[int(torch.randint(len(latents), (), generator=draws.generator))]


class Unmix(Objective):
    """Weight times the mean squared attention of each subject's word over the other's half, by layer, row and head."""

    def __init__(self, subjects: Sequence[Subject], positions: Positions, weight: float, layers: Sequence[str]) -> None:
        self._subjects, self._positions, self._weight = subjects, positions, weight
        self.watched = tuple(layers)

    def loss(self, batch: Batch, maps: Mapping[str, Mapping[int, Tensor]]) -> Tensor | None:
        """Mean over all layers and cut rows of the job's own pictures; None without one."""
        terms: list[Tensor] = []
        for by_row in maps.values():
            for row, attention in by_row.items():
                halves = batch.halves[row]
                for subject, other in ((halves.left, "right"), (halves.right, "left")):
                    places = self._positions(batch.captions[row], self._subjects[subject].identifier)
                    if halves.pictures is not None and places:
                        terms.append(attention_in_half(attention, places, other))
        return self._weight * torch.stack(terms).mean() if terms else None


def middle_half(latents: Tensor) -> Tensor:
    """Columns w/4 to 3w/4 of [..., w]; w must be even. Subjects stand in the middle more often than at a side."""
    width = latents.shape[-1]
    return latents[..., width // 4 : width // 4 + width // 2]


def cut_caption(left: Subject, right: Subject, sides: bool, *, of_class: bool = False) -> str:
    """Caption of a cut row: `a A on the left and a B on the right`, or without the sides."""
    names = [
        f"a {subject.class_noun}" if of_class else f"a {subject.identifier} {subject.class_noun}".rstrip()
        for subject in (left, right)
    ]
    return f"{names[0]} on the left and {names[1]} on the right" if sides else f"{names[0]} and {names[1]}"


def attention_in_half(attention: Tensor, places: Sequence[int], half: str) -> Tensor:
    """Mean square of attention [heads, positions, tokens] to the tokens at `places` over one half of a square map.

    Positions are rows of the square one after another. The middle column of an odd width belongs to neither half.
    """
    side = round(attention.shape[1] ** 0.5)
    # A list as index would be copied to the device, and waited for.
    chosen = attention[:, :, to_device(torch.tensor(list(places)), attention.device)]
    square = chosen.reshape(attention.shape[0], side, side, len(places))
    columns = square[:, :, : side // 2] if half == "left" else square[:, :, (side + 1) // 2 :]
    return columns.square().mean()
