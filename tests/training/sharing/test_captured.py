"""Memory of captured training steps: it goes with its graph, however many sizes come by."""

import weakref
from typing import Any, cast

import torch
from tiny_middle import middle_of, plain
from torch import Tensor

from hueshift.engines.cuda_lane import HostLane
from hueshift.training.sharing.captured import CapturedSteps
from hueshift.training.spec import Precision
from hueshift.training.unet import TrainingUNet

MOST_GRAPHS = 8


def test_sizes_that_come_and_go_leave_no_memory_behind() -> None:
    captured, unet = CapturedSteps(HostLane()), cast(TrainingUNet, cast(Any, plain))
    seen: list[weakref.ref[Tensor]] = []
    for size in range(1, 21):
        given = middle_of(size)
        wanted = (plain(given.noisy, given.timesteps, given.context, given.rows) - given.target).square()
        for _ in range(3):
            errors, _ = captured.run(unet, given, Precision.FP32)
            torch.testing.assert_close(errors, wanted.mean(dim=(1, 2, 3)))
        seen.append(weakref.ref(errors))
        del errors
    assert captured.captures == 20
    assert sum(reference() is not None for reference in seen) == MOST_GRAPHS
    # One that was dropped begins anew, and is right again.
    first = middle_of(1)
    alone = plain(first.noisy, first.timesteps, first.context, first.rows) - first.target
    errors, _ = captured.run(unet, first, Precision.FP32)
    torch.testing.assert_close(errors, alone.square().mean(dim=(1, 2, 3)))


def test_a_size_that_came_once_keeps_no_memory() -> None:
    captured, unet = CapturedSteps(HostLane()), cast(TrainingUNet, cast(Any, plain))
    seen = [weakref.ref(captured.run(unet, middle_of(size), Precision.FP32)[0]) for size in range(1, 6)]
    assert [reference() is not None for reference in seen] == [False] * 4 + [True]
