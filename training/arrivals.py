"""Losses on their way from the device to the host, so that no step waits for one."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# Steps whose losses may be on their way: enough that the device never waits for the host, few enough that a job which
# diverged takes no more than these for nothing, and that what the host queues stays bounded.
MOST_UNDERWAY = 4


class Arrival(Protocol):
    """The mean loss of one step, on its way."""

    def here(self) -> bool:
        """True if `value` would not wait."""
        ...

    def value(self) -> float:
        """Wait for it and return it."""
        ...


def send_loss(parts: Sequence[Tensor]) -> Arrival:
    """Send the mean of the scalar losses of a step's batches, which lie on one device."""
    if parts[0].device.type == "cuda":
        return _Travelling(torch.stack(list(parts)))
    return _Here(_mean([part.item() for part in parts]))


def _mean(parts: Sequence[float]) -> float:
    return sum(parts) / len(parts)


class _Here:
    """From the CPU there is no way to go."""

    def __init__(self, loss: float) -> None:
        self._loss = loss

    def here(self) -> bool:
        """Always."""
        return True

    def value(self) -> float:
        """At once."""
        return self._loss


class _Travelling:
    """A copy into pinned memory, and an event behind it."""

    def __init__(self, parts: Tensor) -> None:
        self._host = torch.empty(parts.shape, dtype=parts.dtype, pin_memory=True)
        self._host.copy_(parts, non_blocking=True)
        # Waiting sleeps: a thread that spins would take a core from those that draw the next batches.
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(parts.device))

    def here(self) -> bool:
        """Ask the event."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def value(self) -> float:
        """Wait for the event."""
        self._event.synchronize()
        return _mean(self._host.tolist())
