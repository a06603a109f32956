"""Training that went where no numbers are."""

import torch
from torch import Tensor

from hueshift.adapters.errors import HueshiftError, Reason


def diverged(what: str, step: int) -> HueshiftError:
    """Return the error (TRAINING_DIVERGED) of a job in which `what` was no finite number at `step`."""
    return HueshiftError(
        Reason.TRAINING_DIVERGED,
        f"training diverged: the {what} was not finite at step {step}; lower settings.learning_rate",
        metadata={"step": str(step)},
    )


def check_finite(tensor: Tensor, step: int, what: str) -> None:
    """Raise HueshiftError (TRAINING_DIVERGED) naming the step if `tensor` holds a value that is not finite.

    Looking waits for the tensor's device.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise diverged(what, step)
