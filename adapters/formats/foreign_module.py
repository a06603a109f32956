"""One changed module of a file: its tensors by role, and the base layer they are for."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hueshift.adapters.container import invalid
from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.formats.source import ForeignFile

# Products of larger ranks could fill the memory before anything else is wrong with them.
MAX_RANK = 2048


@dataclass(frozen=True)
class ForeignModule:
    """`keys` maps roles to the names of the module's tensors; `layer` is the base layer's name."""

    layer: str
    keys: Mapping[str, str]
    source: ForeignFile

    def read(self, role: str) -> Tensor:
        """Read the tensor of a role. Raises InvalidArgument if the module has none."""
        if role not in self.keys:
            present = next(iter(self.keys.values()))
            raise invalid(f"tensor {present!r} has no partner: {role!r} of the same layer is missing")
        return self.source.read(self.keys[role])

    def read_all(self, roles: tuple[str, ...]) -> dict[str, Tensor]:
        """Read those of the roles that are there."""
        return {role: self.read(role) for role in roles if role in self.keys}

    def check_rank(self, role: str, rank: int) -> int:
        """Return the rank. Raises InvalidArgument (ADAPTER_RANK_TOO_LARGE) above what anybody trains."""
        if rank > MAX_RANK:
            raise InvalidArgument(
                Reason.ADAPTER_RANK_TOO_LARGE,
                f"adapter file refused: tensor {self.keys[role]!r} has rank {rank}; allowed: 1 to {MAX_RANK}",
            )
        return rank

    def wrong(self, role: str, tensor: Tensor, allowed: str) -> InvalidArgument:
        """Build the error for a tensor that does not fit the layer."""
        return InvalidArgument(
            Reason.ADAPTER_SHAPE_MISMATCH,
            f"adapter file refused: tensor {self.keys[role]!r} has shape {list(tensor.shape)}, but layer "
            f"{self.layer!r} of the base model needs {allowed}; it was made for another base model",
        )
