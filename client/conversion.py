"""How files of other programs are converted when they are imported, and what became of them."""

from dataclasses import dataclass

from hueshift.v1 import adapters_pb2 as pb


@dataclass(frozen=True, slots=True)
class Conversion:
    """What the caller decides.

    `rank` is the largest rank of a layer; 0 keeps low-rank files as they are and brings all others to rank 16. `word`
    stands for a learned embedding whose file names none. With `served_only`, layers that the server's engine has no
    low-rank branch on are left out; with `complete`, a file of which anything must be left out is refused. With
    `dense`, for rank 0 only, what is not low-rank is kept as full deltas: 1.7 GB for Stable Diffusion 1.x.
    """

    rank: int = 0
    word: str = ""
    served_only: bool = False
    complete: bool = False
    dense: bool = False


@dataclass(frozen=True, slots=True)
class ImportedLayer:
    """One converted layer: what the file held, the rank stored (0: shifts, full deltas), its relative error."""

    layer: str
    form: str
    rank: int
    error: float


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Tensors without effect: how many, some of their names, and why."""

    count: int
    keys: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What became of a file. `error` is the relative Frobenius error of the whole change, `notes` what was assumed."""

    format: str
    layers: tuple[ImportedLayer, ...]
    words: tuple[str, ...]
    error: float
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]

    @property
    def kept_energy(self) -> float:
        """Part of the squared Frobenius norm of the change that is kept."""
        return 1.0 - self.error**2


def read_report(message: pb.ImportReport) -> ImportReport:
    """Return the report of a message."""
    return ImportReport(
        format=message.format,
        layers=tuple(ImportedLayer(part.layer, part.form, part.rank, part.error) for part in message.layers),
        words=tuple(message.words),
        error=message.error,
        left_out=tuple(LeftOut(part.count, tuple(part.keys), part.reason) for part in message.left_out),
        notes=tuple(message.notes),
    )
