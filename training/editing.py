"""Edits of one picture: how well inversion and the way back keep it, by the base and by what was tuned on it."""

from dataclasses import dataclass

from torch import Tensor

from hueshift.engines.conditioning import CrossInputs
from hueshift.engines.interface import Plan
from hueshift.engines.picture_start import inversion_error
from hueshift.training.methods.learnable import Rows
from hueshift.training.samples import RowsEngine, Sampler

# Each of the two takes as many UNet calls there and as many back; SVDiff's own 50 would be 200, minutes of a slow CPU.
INVERSION_STEPS = 20


@dataclass(frozen=True, slots=True)
class InversionErrors:
    """Relative errors of a picture's latents (engines.picture_start.inversion_error) before and after tuning."""

    base: float
    tuned: float


def measure_inversion(
    sampler: Sampler, clean: Tensor, base: tuple[Tensor, Rows], tuned: tuple[Tensor, Rows]
) -> InversionErrors:
    """Invert latents [C, h, w] and come back without guidance, with the (context [tokens, width], rows) of each.

    Raises what the sampler's check raises.
    """

    def error(context: Tensor, rows: Rows) -> float:
        sampler.check()
        return inversion_error(
            RowsEngine(sampler.unet, rows),
            [clean],
            sampler.base.schedule,
            cross=CrossInputs((context[None],)),
            steps=INVERSION_STEPS,
            needs_factored=sampler.unet.plan is Plan.FACTORED,
        )

    return InversionErrors(error(*base), error(*tuned))
