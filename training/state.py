"""The moving parts of a run: tensors in training, their optimiser and average, what is drawn at random, the losses.

Values, gradients, moments and averages lie on the device that trains. What is drawn at random is drawn on the host, by
the job's own generator: a job then has the same numbers alone, in company and on every device, and nothing random is
left for a device to remember.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hueshift.training.arrivals import Arrival, send_loss
from hueshift.training.checkpoint import Checkpoint
from hueshift.training.divergence import diverged
from hueshift.training.objectives.objective import Draws
from hueshift.training.optimizer import Moments, Update, apply_updates
from hueshift.training.spec import RateSchedule, TrainingSpec

_CPU = torch.device("cpu")
# Names in a checkpoint, which torch's AdamW had.
_STEP, _FIRST, _SECOND = ("optimizer/step/", "optimizer/exp_avg/", "optimizer/exp_avg_sq/")


class TrainingState:
    """Everything that a step changes; its tensors are copies of `values` on `device`.

    `send` takes the losses of a step's batches to the host.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        rates: Mapping[str, float],
        generator: torch.Generator,
        spec: TrainingSpec,
        device: torch.device = _CPU,
        send: Callable[[Sequence[Tensor]], Arrival] = send_loss,
    ) -> None:
        self.device = device
        self.values = {name: value.detach().to(device, copy=True).requires_grad_() for name, value in values.items()}
        self.average = {}
        if spec.ema_decay:
            self.average = {name: value.detach().clone() for name, value in self.values.items()}
        self.draws = Draws(generator)
        self.losses: list[float] = []
        # Best loss of the checks so far, and how many in a row brought nothing.
        self.plateau = torch.tensor([math.inf, 0.0], dtype=torch.float64)
        self._rates = dict(rates)
        self._spec = spec
        self._send = send
        self._underway: deque[Arrival] = deque()
        self._moments: dict[str, Moments] = {}

    @property
    def step(self) -> int:
        """Finished steps, of which the last may have their losses still underway."""
        return len(self.losses) + len(self._underway)

    @property
    def ended(self) -> bool:
        """True if no step is left, or the plateau lasts as long as the job allows."""
        patience = self._spec.early_stop
        return self.step >= self._spec.steps or (patience > 0 and int(self.plateau[1]) >= patience)

    @property
    def result(self) -> Mapping[str, Tensor]:
        """The values to use: the moving average where there is one."""
        return self.average or self.values

    def backward(self, root: Tensor, *, first: bool = True) -> None:
        """Carry the gradient of a scalar to the values. It is added to what there is unless it is the step's first."""
        # A batch whose captions were all dropped says nothing about a word, and a job may learn words alone.
        values = list(self.values.values())
        if root.requires_grad:
            # Parts of one long gradient, as they are: `torch.autograd.backward` would copy each, with its own launch.
            self.take_gradients(torch.autograd.grad([root], values, allow_unused=True), first=first)
        elif first:
            self.forget_gradients()

    def take_gradients(self, gradients: Sequence[Tensor | None], *, first: bool = True) -> None:
        """Take gradients that were found elsewhere, in the order of the values; added as `backward` adds them."""
        for value, gradient in zip(self.values.values(), gradients, strict=True):
            if first:
                value.grad = gradient
            elif gradient is not None:
                value.grad = gradient if value.grad is None else value.grad + gradient

    def forget_gradients(self) -> None:
        """Drop what the last step left."""
        for value in self.values.values():
            value.grad = None

    def due(self) -> list[Update]:
        """What the optimiser has to do in this step: each value that has a gradient, at the rate of the step."""
        scale = rate_scale(self.step, self._spec.warmup_steps, self._spec.steps, self._spec.rate_schedule)
        updates: list[Update] = []
        for name, value in self.values.items():
            if value.grad is None:
                continue
            if name not in self._moments:
                self._moments[name] = Moments(torch.zeros_like(value), torch.zeros_like(value))
            self._moments[name].steps += 1
            updates.append(Update(value, value.grad, self._moments[name], self._rates[name] * scale))
        return updates

    def averaging(self) -> tuple[list[Tensor], list[Tensor], float]:
        """Averages, the values that they follow, and by what share they move in this step."""
        # The average follows closely at first, so that it never remembers the start.
        decay = min(self._spec.ema_decay, (self.step + 1) / (self.step + 10))
        values = [self.values[name].detach() for name in self.average]
        return list(self.average.values()), values, 1 - decay

    def count(self, losses: Sequence[Tensor]) -> None:
        """Count a step, which `update_together` has taken, and send the losses of its batches on their way."""
        self._underway.append(self._send(losses))

    def arrived(self, underway: int = 0) -> list[float]:
        """Return the losses that came to the host since they were last asked for, in order.

        Waits until at most `underway` are on their way. Raises HueshiftError (TRAINING_DIVERGED) naming the step of
        one that is no finite number; the values are of no use then, and there is no checkpoint of them.
        """
        found: list[float] = []
        while self._underway and (len(self._underway) > underway or self._underway[0].here()):
            loss = self._underway[0].value()
            if not math.isfinite(loss):
                raise diverged("loss", len(self.losses) + 1)
            self._underway.popleft()
            self.losses.append(loss)
            found.append(loss)
        return found

    def judge(self, loss: float, least_gain: float) -> None:
        """Count a check as one of a plateau unless `loss` is below the best by the share `least_gain`."""
        best, stale = self.plateau.tolist()
        better = loss < best * (1 - least_gain)
        self.plateau = torch.tensor([min(best, loss), 0.0 if better else stale + 1], dtype=torch.float64)

    def capture(self) -> Checkpoint:
        """Copy the state to the host, losses included. Between steps there are no gradients to keep.

        Raises what `arrived` raises, which must be asked first by who reports losses one by one.
        """
        self.arrived()
        tensors = {f"value/{name}": _kept(value) for name, value in self.values.items()}
        tensors |= {f"average/{name}": _kept(value) for name, value in self.average.items()}
        for name, moments in self._moments.items():
            tensors[_STEP + name] = torch.tensor(float(moments.steps))
            tensors |= {_FIRST + name: _kept(moments.first), _SECOND + name: _kept(moments.second)}
        tensors |= {f"order/{name}": order.clone() for name, order in self.draws.orders.items()}
        tensors["random"] = self.draws.generator.get_state()
        tensors["plateau"] = self.plateau.clone()
        return Checkpoint(self.step, tensors, list(self.losses))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become what `capture` copied, on whatever device. Raises KeyError if the checkpoint is of another method."""
        tensors = checkpoint.tensors
        self._moments.clear()
        with torch.no_grad():
            for name, value in self.values.items():
                value.copy_(tensors[f"value/{name}"])
                if _STEP + name in tensors:
                    first, second = (tensors[key + name].to(self.device, copy=True) for key in (_FIRST, _SECOND))
                    self._moments[name] = Moments(first, second, int(tensors[_STEP + name]))
            for name, mean in self.average.items():
                mean.copy_(tensors[f"average/{name}"])
        orders = {name.removeprefix("order/"): order for name, order in tensors.items() if name.startswith("order/")}
        self.draws.orders = orders
        self.draws.generator.set_state(tensors["random"])
        self.plateau = tensors["plateau"]
        self.losses = list(checkpoint.losses)
        self._underway.clear()


def update_together(states: Sequence[TrainingState]) -> None:
    """Take the optimiser steps of states on one device and move their averages, all in a few launches.

    Gradients are dropped: the next forward pass needs their memory.
    """
    apply_updates([update for state in states for update in state.due()])
    means: list[Tensor] = []
    followed: list[Tensor] = []
    shares: list[float] = []
    for state in states:
        state.forget_gradients()
        averages, values, share = state.averaging()
        means += averages
        followed += values
        shares += [share] * len(averages)
    if means:
        torch._foreach_lerp_(means, followed, shares)


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def rate_scale(step: int, warmup: int, steps: int, schedule: RateSchedule = RateSchedule.LINEAR) -> float:
    """Share of the peak learning rate at `step`: a linear rise over `warmup` steps, times the schedule's fall."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    match schedule:
        case RateSchedule.CONSTANT:
            fall = 1.0
        case RateSchedule.COSINE:
            fall = (1 + math.cos(math.pi * step / steps)) / 2
        case RateSchedule.LINEAR:
            fall = 1 - step / steps
    return rise * fall
