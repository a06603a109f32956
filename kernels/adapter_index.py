"""The index that says which adapter slot each sample of a batch uses, checked on the host before it is uploaded."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hueshift.kernels.errors import KernelArgumentError

NO_ADAPTER = -1


def make_index(values: Sequence[int], *, slots: int, device: torch.device, none_allowed: bool = True) -> Tensor:
    """Return `values` as an int32 tensor [N] on `device`.

    Each value is a slot 0..slots-1, or NO_ADAPTER where `none_allowed`. Raises KernelArgumentError otherwise.
    """
    low = NO_ADAPTER if none_allowed else 0
    for position, value in enumerate(values):
        if not low <= value < slots:
            raise KernelArgumentError(f"index[{position}] is {value} (allowed: {low}..{slots - 1})")
    return torch.tensor(list(values), dtype=torch.int32).to(device)
