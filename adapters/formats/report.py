"""What became of a file of another program. Records only; torch is not needed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MAX_NAMED = 8


@dataclass(frozen=True, slots=True)
class ConvertedLayer:
    """One layer. `form` is what the file held (lora, dora, loha, lokr, dense, norm, spectral).

    `rank` is what is stored, 0 for shifts and full deltas. `norm` is the Frobenius norm of the change that the file
    defines, `residual` that of what was lost; it is 0 where the file's own values are kept.
    """

    layer: str
    form: str
    rank: int
    norm: float
    residual: float = 0.0

    @property
    def error(self) -> float:
        """Relative Frobenius error."""
        return self.residual / self.norm if self.norm else 0.0


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Tensors that have no effect here: how many, the first few of their names, and why."""

    count: int
    keys: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class ImportReport:
    """How a file was converted. `layers` are in the base model's order, `notes` are what was assumed."""

    format: str
    layers: tuple[ConvertedLayer, ...] = ()
    words: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """Relative Frobenius error of the change of the whole UNet."""
        total = math.fsum(layer.norm**2 for layer in self.layers)
        lost = math.fsum(layer.residual**2 for layer in self.layers)
        return math.sqrt(lost / total) if total else 0.0

    @property
    def kept_energy(self) -> float:
        """Part of the squared Frobenius norm of the change that is kept."""
        return 1.0 - self.error**2


def name_some(names: Sequence[str]) -> str:
    """Return the first few names for a message, and how many more there are."""
    shown = ", ".join(repr(name[:120]) for name in names[:MAX_NAMED])
    more = len(names) - MAX_NAMED
    return f"{shown} and {more} more" if more > 0 else shown
