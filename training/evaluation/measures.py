"""The numbers of an evaluation, computed from unit embeddings of pictures and texts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """What a case scored; None where it was not measured or makes no sense. All are means of cosines.

    `clip_i` and `dino` compare every drawn picture with every real one, `truth` each with the one true picture of its
    prompt, `clip_t` with the prompt without the learned word (DreamBooth, Ruiz et al. 2023). `prior` is
    CLIP-I of pictures of other prompts after and before, of the same seeds: 1 means that nothing has changed.
    `diversity` and `dino_diversity` are 1 minus the cosine of pictures of one prompt with each other. DreamBooth takes
    LPIPS for that, whose weights are not at hand; the figures cannot be compared with its own.
    """

    clip_i: float | None = None
    dino: float | None = None
    truth: float | None = None
    clip_t: float | None = None
    prior: float | None = None
    diversity: float | None = None
    dino_diversity: float | None = None

    def to_json(self) -> dict[str, float]:
        """Return those that were measured, to four digits: seeds differ in the second."""
        return {name: round(value, 4) for name, value in asdict(self).items() if value is not None}


def mean_cosine(one: Tensor, other: Tensor) -> float:
    """Mean cosine of every row of `one` [n, width] with every row of `other` [m, width], both of unit length."""
    return float((one @ other.T).mean())


def paired_cosine(one: Tensor, other: Tensor) -> float:
    """Mean cosine of rows at the same place of `one` and `other` [n, width], both of unit length."""
    return float((one * other).sum(-1).mean())


def mutual_cosine(rows: Tensor) -> float | None:
    """Mean cosine of every two different rows of [n, width]; None for fewer than two."""
    count = len(rows)
    if count < 2:
        return None
    above = torch.triu_indices(count, count, 1)
    return float((rows @ rows.T)[above[0], above[1]].mean())


def diversity(groups: Sequence[Tensor]) -> float | None:
    """Mean over prompts of 1 minus the mean cosine of its pictures [n, width] with each other.

    None if no prompt has two pictures.
    """
    alike = [cosine for rows in groups if (cosine := mutual_cosine(rows)) is not None]
    return 1 - fmean(alike) if alike else None


def diversity_of(rows: Tensor, prompts: Sequence[str]) -> float | None:
    """`diversity` of pictures [n, width] drawn for these prompts, equal ones being one group."""
    places: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(place)
    return diversity([rows[at] for at in places.values()])
