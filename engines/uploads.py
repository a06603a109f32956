"""Values of the host on their way to a device, and results of a lane on their way to others."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from hueshift.engines.cuda_lane import GraphLane

Made = TypeVar("Made")


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy values of the host to `device` without waiting for what is queued there; on the same device, nothing is
    copied.

    A plain copy to a GPU makes the host wait until its stream has come so far: with a step queued ahead, that is the
    whole of that step. From page-locked memory, which torch keeps until the copy is done, it does not.
    """
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def make_beside(lane: GraphLane, make: Callable[[], Made], tensors: Callable[[Made], tuple[Tensor, ...]]) -> Made:
    """Run `make` on a lane of its own and return what it made, finished, so that any stream may read it.

    The caller's thread sleeps until then; steps that are queued elsewhere go on meanwhile. `tensors` names those of the
    result that the default stream will read, later and for as long as they are held.
    """
    with lane.apart():
        made = make()
        lane.lend(tensors(made))
        done = lane.mark()
    done.wait()
    return made
