"""The middle of a step through torch.compile: UNet and loss as one graph, and its way back as another.

Where a middle cannot be compiled, or what comes out computes something else, it runs as torch launches it. That is told
as an error in the log, once for each shape, and the job goes on: whoever sent it chose neither the machine nor the
setting, its adapter is the same within rounding, and with jobs that fail a worker whose compiler is broken would empty
the whole queue in no time.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import structlog
import torch
from torch import Tensor

from hueshift.engines.cuda_graphs import GraphKey
from hueshift.engines.device_errors import Fault, classify
from hueshift.training.methods.learnable import Rows
from hueshift.training.unet import TrainingUNet

Errors = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor], Tensor]
"""(noisy, timesteps, context, spectral rows, low-rank rows, target) -> mean squared error [n], differentiable."""

Compiler = Callable[[Errors], Errors]

# Entries that torch.compile may keep for one function; it counts all UNets and sizes of a process together.
_MOST_SHAPES = 512
# Of losses and gradients, in fp32 and with products in bfloat16. Seen on a tiny UNet were 2e-6, and 9e-3 of the largest
# gradient, where other kernels round elsewhere.
_TOLERANCE = {False: 1e-3, True: 1e-1}
_log = structlog.get_logger()


def plain_errors(unet: TrainingUNet) -> Errors:
    """The errors of a UNet's output as torch launches it."""

    def errors(
        noisy: Tensor, timesteps: Tensor, context: Tensor, spectral: Tensor | None, lowrank: Tensor | None, aim: Tensor
    ) -> Tensor:
        return _errors(unet(noisy, timesteps, context, Rows(spectral, lowrank)), aim)

    return errors


def readable_errors(unet: TrainingUNet) -> Errors:
    """The same in a form that torch.compile can read, for who holds the UNet's lock."""

    def errors(
        noisy: Tensor, timesteps: Tensor, context: Tensor, spectral: Tensor | None, lowrank: Tensor | None, aim: Tensor
    ) -> Tensor:
        return _errors(unet.run_rows(noisy, timesteps, context, spectral, lowrank), aim)

    return errors


def _errors(output: Tensor, aim: Tensor) -> Tensor:
    return (output.float() - aim).square().mean(dim=(1, 2, 3))


def inductor(errors: Errors) -> Errors:
    """Compile for the shapes of each call, without Python in between; our own CUDA graphs hold what comes out.

    Inductor tries out no configurations that change sums: a job that goes on in another process has the same bits.
    """
    options: dict[str, str | int | bool | Callable[..., Any]] = {
        "triton.cudagraphs": False,
        "freezing": False,
        "deterministic": True,
    }
    return compiled_by(lambda function: torch.compile(function, fullgraph=True, dynamic=False, options=options))(errors)


def compiled_by(compile_function: Callable[[Errors], Errors]) -> Compiler:
    """A compiler with torch's settings as a training step needs them, in whatever thread it runs."""

    def compiler(errors: Errors) -> Errors:
        compiled = compile_function(errors)

        def call(*inputs: Any) -> Tensor:
            dynamo: Any = torch._dynamo.config
            functorch: Any = torch._functorch.config
            with (
                dynamo.patch(recompile_limit=_MOST_SHAPES, accumulated_recompile_limit=_MOST_SHAPES),
                # As it is without compiling: mixed precision is for the way there.
                functorch.patch(backward_pass_autocast="off"),
            ):
                return compiled(*inputs)

        return call

    return compiler


class FallingBack:
    """Runs middles of one UNet compiled, and plain those that cannot be. For one thread at a time, as the UNet.

    The first time that a shape comes both ways run. What was compiled is kept if it computed the same, and then its
    numbers count from that step on: a job that goes on in another process has the same bits as in this one. That is no
    formality: without `repeat_pixels`, what torch 2.13 made of a tiny UNet on a CPU lost all gradients that come
    through its upsampler, 13 % of the whole, with every loss right.
    """

    def __init__(self, unet: TrainingUNet, compiler: Compiler) -> None:
        self._plain = plain_errors(unet)
        self._compiled: Errors | None = None
        # Of each shape that came: which way it runs.
        self._chosen: dict[GraphKey, Errors] = {}
        if unet.checkpointing:
            _log.warning("training.not_compiled", reason="activations are computed again (gradient_checkpointing)")
        else:
            unet.repeat_pixels()
            self._compiled = compiler(readable_errors(unet))

    def run(self, key: GraphKey, compute: Callable[[Errors], None], made: Sequence[Tensor], *, lowered: bool) -> None:
        """Let `compute` fill `made` by errors of one way or the other; `lowered` says that products are in bfloat16.

        Raises what the plain way raises, and what says nothing about compiling: no memory, or no device.
        """
        chosen = self._plain if self._compiled is None else self._chosen.get(key)
        if chosen is not None:
            # While a graph is captured nothing else may run, so what fails there is the graph's.
            compute(chosen)
        elif self._compiled is not None:
            self._choose(key, self._compiled, compute, made, _TOLERANCE[lowered])

    def _choose(
        self,
        key: GraphKey,
        compiled: Errors,
        compute: Callable[[Errors], None],
        made: Sequence[Tensor],
        tolerance: float,
    ) -> None:
        begun, problem, found = time.monotonic(), "", list[Tensor]()
        try:
            compute(compiled)
            found = [part.clone() for part in made]
        except Exception as error:
            if classify(error) is not Fault.OTHER:
                raise
            # Torch puts what it was that failed into the second line.
            lines = [line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
            problem = " ".join(lines[:2])
        # If this fails too it was not the compiler.
        compute(self._plain)
        if not problem:
            apart = largest_difference(found, made)
            if not math.isfinite(apart) and not all(bool(part.isfinite().all()) for part in made):
                # A job that diverges tells nothing: the next one of this shape will.
                return
            if not apart <= tolerance:
                problem = f"losses or gradients differ by {apart:.1e} of their size; allowed: {tolerance:.0e}"
        about = {"role": key.role, "rows": key.shape.rows}
        if problem:
            self._chosen[key] = self._plain
            _log.error("training.compile_failed", **about, error=problem)
        else:
            self._chosen[key] = compiled
            for part, own in zip(made, found, strict=True):
                part.copy_(own)
            _log.info("training.compiled", **about, seconds=round(time.monotonic() - begun, 1))


def largest_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the difference over that of what is expected, of the pair where it is largest; nan if any is."""
    errors = []
    for one, other in zip(found, expected, strict=True):
        size, difference = other.float().norm(), (one.float() - other.float()).norm()
        errors.append(float(difference / size) if bool(size > 0) else float(difference))
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)
