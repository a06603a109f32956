"""The moving parts of a run: tensors in training, their optimiser and average, the random generator, the losses."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hueshift.training.checkpoint import Checkpoint
from hueshift.training.spec import TrainingSpec

IDENTIFIER = "identifier"


class TrainingState:
    """Everything that a step changes. `order` holds the pictures not yet seen in this pass over them."""

    def __init__(
        self, values: Mapping[str, Tensor], rates: Mapping[str, float], generator: torch.Generator, spec: TrainingSpec
    ) -> None:
        self.values = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
        self.average = {name: value.detach().clone() for name, value in values.items()} if spec.ema_decay else {}
        self.generator = generator
        self.order = torch.zeros(0, dtype=torch.int64)
        self.class_order = torch.zeros(0, dtype=torch.int64)
        self.losses: list[float] = []
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
    def result(self) -> Mapping[str, Tensor]:
        """The values to use: the moving average where there is one."""
        return self.average or self.values

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a scalar loss."""
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]

    def update(self, loss: float) -> None:
        """Take the optimiser step, move the average, count the step."""
        scale = rate_scale(self.step, self._spec.warmup_steps, self._spec.steps)
        for group, rate in zip(self._optimizer.param_groups, self._rates.values(), strict=True):
            group["lr"] = rate * scale
        self._optimizer.step()
        # The average follows closely at first, so that it never remembers the start.
        decay = min(self._spec.ema_decay, (self.step + 1) / (self.step + 10))
        for name, mean in self.average.items():
            mean.lerp_(self.values[name].detach(), 1 - decay)
        self.losses.append(loss)

    def take(self, count: int, total: int, *, of_class: bool = False) -> Tensor:
        """Take `count` of `total` pictures; each is taken once before any is taken again."""
        order = self.class_order if of_class else self.order
        while len(order) < count:
            order = torch.cat([order, torch.randperm(total, generator=self.generator)])
        taken, order = order[:count], order[count:]
        if of_class:
            self.class_order = order
        else:
            self.order = order
        return taken

    def capture(self) -> Checkpoint:
        """Copy the state."""
        tensors = {f"value/{name}": value.detach().clone() for name, value in self.values.items()}
        tensors |= {f"average/{name}": value.clone() for name, value in self.average.items()}
        for name, value in self.values.items():
            for key, moment in self._optimizer.state[value].items():
                tensors[f"optimizer/{key}/{name}"] = moment.clone()
        tensors["order"], tensors["class_order"] = self.order.clone(), self.class_order.clone()
        tensors["random"] = self.generator.get_state()
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
        self.order, self.class_order = tensors["order"], tensors["class_order"]
        self.generator.set_state(tensors["random"])
        self.losses = list(checkpoint.losses)


def rate_scale(step: int, warmup: int, steps: int) -> float:
    """Share of the peak learning rate at `step`: a linear rise over `warmup` steps, times a linear fall to zero."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return rise * (1 - step / steps)
