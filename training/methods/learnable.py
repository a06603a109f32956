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
from hueshift.engines.transfer import to_device

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
        """Put everything on a device, without waiting for it."""
        spectral, lowrank = (None if row is None else to_device(row, device) for row in (self.spectral, self.lowrank))
        return Rows(spectral, lowrank, {name: to_device(weight, device) for name, weight in self.weights.items()})


class Constant:
    """A tensor that is used where the values lie, wherever that is: copied to a device once."""

    def __init__(self, tensor: Tensor) -> None:
        self._first = tensor
        self._on = {tensor.device: tensor}

    def on(self, device: torch.device) -> Tensor:
        """Return the tensor on a device."""
        if device not in self._on:
            self._on[device] = to_device(self._first, device)
        return self._on[device]


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
