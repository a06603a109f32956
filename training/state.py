"""The moving parts of a run: tensors in training, their optimiser and average, what is drawn at random, the losses."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hueshift.training.checkpoint import Checkpoint
from hueshift.training.objectives.objective import Draws
from hueshift.training.spec import RateSchedule, TrainingSpec


class TrainingState:
    """Everything that a step changes."""

    def __init__(
        self, values: Mapping[str, Tensor], rates: Mapping[str, float], generator: torch.Generator, spec: TrainingSpec
    ) -> None:
        self.values = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
        self.average = {name: value.detach().clone() for name, value in values.items()} if spec.ema_decay else {}
        self.draws = Draws(generator)
        self.losses: list[float] = []
        # Best loss of the checks so far, and how many in a row brought nothing.
        self.plateau = torch.tensor([math.inf, 0.0], dtype=torch.float64)
        self._rates = dict(rates)
        self._spec = spec
        # Second moments over about 100 steps, because a run has few more; no decay, because zero already is the base.
        groups = [{"params": [value], "lr": self._rates[name]} for name, value in self.values.items()]
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)

    @property
    def step(self) -> int:
        """Finished steps."""
        return len(self.losses)

    @property
    def ended(self) -> bool:
        """True if no step is left, or the plateau lasts as long as the job allows."""
        patience = self._spec.early_stop
        return self.step >= self._spec.steps or (patience > 0 and int(self.plateau[1]) >= patience)

    @property
    def result(self) -> Mapping[str, Tensor]:
        """The values to use: the moving average where there is one."""
        return self.average or self.values

    def backward(
        self, roots: Sequence[Tensor], gradients: Sequence[Tensor | None] = (None,), *, first: bool = True
    ) -> None:
        """Carry gradients from `roots` to the values, None standing for 1 at a scalar loss.

        They are added to those there are unless it is the step's `first` time.
        """
        if first:
            self._optimizer.zero_grad()
        # A batch whose captions were all dropped says nothing about a word, and a job may learn words alone.
        if roots:
            torch.autograd.backward(roots, gradients)

    def update(self, loss: float) -> None:
        """Take the optimiser step, move the average, count the step."""
        scale = rate_scale(self.step, self._spec.warmup_steps, self._spec.steps, self._spec.rate_schedule)
        for group, rate in zip(self._optimizer.param_groups, self._rates.values(), strict=True):
            group["lr"] = rate * scale
        self._optimizer.step()
        # The average follows closely at first, so that it never remembers the start.
        decay = min(self._spec.ema_decay, (self.step + 1) / (self.step + 10))
        for name, mean in self.average.items():
            mean.lerp_(self.values[name].detach(), 1 - decay)
        self.losses.append(loss)

    def judge(self, loss: float, least_gain: float) -> None:
        """Count a check as one of a plateau unless `loss` is below the best by the share `least_gain`."""
        best, stale = self.plateau.tolist()
        better = loss < best * (1 - least_gain)
        self.plateau = torch.tensor([min(best, loss), 0.0 if better else stale + 1], dtype=torch.float64)

    def capture(self) -> Checkpoint:
        """Copy the state. Between steps there are no gradients to keep."""
        tensors = {f"value/{name}": value.detach().clone() for name, value in self.values.items()}
        tensors |= {f"average/{name}": value.clone() for name, value in self.average.items()}
        for name, value in self.values.items():
            for key, moment in self._optimizer.state[value].items():
                tensors[f"optimizer/{key}/{name}"] = moment.clone()
        tensors |= {f"order/{name}": order.clone() for name, order in self.draws.orders.items()}
        tensors["random"] = self.draws.generator.get_state()
        tensors["plateau"] = self.plateau.clone()
        return Checkpoint(self.step, tensors, list(self.losses))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become what `capture` copied. Raises KeyError if the checkpoint is of another method."""
        tensors = checkpoint.tensors
        with torch.no_grad():
            for name, value in self.values.items():
                value.copy_(tensors[f"value/{name}"])
                prefix, end = "optimizer/", f"/{name}"
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"{prefix}{key}{end}" in tensors:
                        self._optimizer.state[value][key] = tensors[f"{prefix}{key}{end}"].clone()
            for name, mean in self.average.items():
                mean.copy_(tensors[f"average/{name}"])
        orders = {name.removeprefix("order/"): order for name, order in tensors.items() if name.startswith("order/")}
        self.draws.orders = orders
        self.draws.generator.set_state(tensors["random"])
        self.plateau = tensors["plateau"]
        self.losses = list(checkpoint.losses)


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
