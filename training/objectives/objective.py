"""The interface of objectives: what each may do to the rows of a step, and what it may add to the loss."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Halves:
    """A row whose left half shows subject `left` and whose right half subject `right`, as indices of the job's.

    `pictures` are the training pictures of the halves, None for pictures that the base drew.
    """

    left: int
    right: int
    pictures: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows of one step: `clean` latents and `noise` [n, 4, h, w], `timesteps` [n] int64, `weights` [n].

    `weights` are the rows' shares of the loss. `captions` has one for each row, `pictures` [n] int64 the training
    picture (variants counted one by one) of each row, -1 for rows that show none. `pixel_weights` [n, 1, h, w] weighs
    positions, None all alike. `halves` tells which rows are cut. Before the noise is drawn it is empty.
    """

    clean: Tensor
    noise: Tensor
    timesteps: Tensor
    weights: Tensor
    captions: tuple[str, ...] = ()
    pictures: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    pixel_weights: Tensor | None = None
    halves: Mapping[int, Halves] = field(default_factory=dict)


class Draws:
    """Where an objective gets what is random: the job's generator, and orders that a checkpoint keeps."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.orders: dict[str, Tensor] = {}

    def take(self, name: str, count: int, total: int) -> Tensor:
        """Take `count` [count] int64 of `total` things; under one name each is taken once before any is again."""
        order = self.orders.get(name, torch.zeros(0, dtype=torch.int64))
        while len(order) < count:
            order = torch.cat([order, torch.randperm(total, generator=self.generator)])
        self.orders[name] = order[count:]
        return order[:count]


class Objective:
    """One piece of what is minimised. Each method may be left as it is here, where it changes nothing.

    In a step `rows` of all objectives run in order, then the noise is drawn, then `noised` of all, then the UNet, then
    `loss` of all. An objective draws at random only from `draws`, and only when it is in use, so that a job without
    it is the same to the bit.
    """

    watched: tuple[str, ...] = ()
    """Names of the cross-attentions whose maps `loss` reads."""

    def rows(self, batch: Batch, draws: Draws) -> Batch:
        """Add or change rows, before there is noise."""
        return batch

    def noised(self, batch: Batch, draws: Draws) -> Batch:
        """Change noise or weights."""
        return batch

    def loss(self, batch: Batch, maps: Mapping[str, Mapping[int, Tensor]]) -> Tensor | None:
        """Return a scalar to add to the loss, or None.

        `maps` has, for each watched cross-attention, the attention [heads, positions, tokens] of every cut row by its
        index, differentiable.
        """
        return None
