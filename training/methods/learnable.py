"""What a method is to the training loop: named tensors, what they make of the UNet, and the adapter they become.

Values travel as plain dicts of tensors, so that the same functions serve the tensors in training and their moving
average.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from hueshift.adapters.adapter import Adapter
from hueshift.engines.interface import Plan
from hueshift.engines.rows import RowLayout

Values = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What a UNet runs with: rows [1, size] as in EngineRow, None for the base's own, and changed weights by layer.

    `weights` have the shapes of the base's own and stand in for them; they are for methods whose change has no row.
    """

    spectral: Tensor | None = None
    lowrank: Tensor | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Rows":
        """Put everything on a device."""
        spectral, lowrank = (None if row is None else row.to(device) for row in (self.spectral, self.lowrank))
        return Rows(spectral, lowrank, {name: weight.to(device) for name, weight in self.weights.items()})


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """An adapter without its words, and the share of learned energy it keeps; None where nothing was left out."""

    adapter: Adapter
    kept_energy: float | None = None


class Learnable(Protocol):
    """One method's trainable tensors."""

    @property
    def plan(self) -> Plan:
        """Plan that the rows need."""
        ...

    @property
    def layout(self) -> RowLayout:
        """Layout of the rows."""
        ...

    def initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the tensors at step 0, which leave the base model as it is."""
        ...

    def learning_rate(self, name: str) -> float:
        """Peak learning rate of a tensor."""
        ...

    def rows(self, values: Values) -> Rows:
        """Make the rows of `values`, differentiable with respect to them."""
        ...

    def base_rows(self) -> Rows:
        """Return the rows of the base model itself."""
        ...

    def adapter(self, values: Values) -> Learned:
        """Make the adapter, without the words: those are not the method's."""
        ...
