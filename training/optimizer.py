"""AdamW (Loshchilov and Hutter 2019) without decay, for the values of several jobs at once.

Counts and rates are kept on the host, so that a step waits for nothing: on a device it queues a few launches whatever
the number of values, and of jobs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

# Second moments over about 100 steps, because a run has few more; no decay, because zero already is the base.
BETAS = (0.9, 0.99)
_EPSILON = 1e-8
# A fused kernel takes one rate and one count for all its tensors. A job has two or three rates; jobs that began at
# different steps have more, and then the eight launches of the other form are fewer.
_MOST_FUSED = 4


@dataclass(slots=True, eq=False)
class Moments:
    """Running means of a value's gradient and of its square, of the value's shape, after `steps` updates."""

    first: Tensor
    second: Tensor
    steps: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """One value, its gradient and its moments, of which the step is counted; `rate` is the learning rate now."""

    value: Tensor
    gradient: Tensor
    moments: Moments
    rate: float


@torch.no_grad()
def apply_updates(updates: Sequence[Update]) -> None:
    """Move all values, which lie on one device, and their moments.

    On the CPU with the bits of torch.optim.AdamW with these betas and no decay, one value at a time.
    """
    if not updates:
        return
    ordered = sorted(updates, key=_same)
    groups = [list(group) for _, group in groupby(ordered, key=_same)]
    if updates[0].value.device.type != "cpu" and len(groups) <= _MOST_FUSED:
        for group in groups:
            _move_fused(group)
    else:
        _move_lists(updates)


def _same(update: Update) -> tuple[float, int]:
    return update.rate, update.moments.steps


def _move_fused(updates: Sequence[Update]) -> None:
    """One pass over the memory, for values that have the rate and the count in common."""
    rate, steps = _same(updates[0])
    count = torch.full((), float(steps), device=updates[0].value.device)
    torch._fused_adamw_(
        [update.value for update in updates],
        [update.gradient for update in updates],
        [update.moments.first for update in updates],
        [update.moments.second for update in updates],
        [],
        [count] * len(updates),
        lr=rate,
        beta1=BETAS[0],
        beta2=BETAS[1],
        weight_decay=0.0,
        eps=_EPSILON,
        amsgrad=False,
        maximize=False,
    )


def _move_lists(updates: Sequence[Update]) -> None:
    """Eight launches for any values with any rates and counts."""
    gradients = [update.gradient for update in updates]
    first = [update.moments.first for update in updates]
    second = [update.moments.second for update in updates]
    steps = [update.moments.steps for update in updates]
    torch._foreach_lerp_(first, gradients, 1 - BETAS[0])
    torch._foreach_mul_(second, BETAS[1])
    torch._foreach_addcmul_(second, gradients, gradients, 1 - BETAS[1])
    below = torch._foreach_sqrt(second)
    torch._foreach_div_(below, [(1 - BETAS[1] ** count) ** 0.5 for count in steps])
    torch._foreach_add_(below, _EPSILON)
    sizes = [-(update.rate / (1 - BETAS[0] ** count)) for update, count in zip(updates, steps, strict=True)]
    torch._foreach_addcdiv_([update.value for update in updates], first, below, sizes)
