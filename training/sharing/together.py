"""One step of several jobs: one pass of the text encoder, one of the UNet, one way back, one optimiser step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import structlog
import torch
from torch import Tensor

from hueshift.engines.text import TextStage
from hueshift.engines.transfer import to_device
from hueshift.training.conditions import encode_packed
from hueshift.training.devices import lacks_memory
from hueshift.training.methods.learnable import Rows
from hueshift.training.objectives.denoising import denoising_loss
from hueshift.training.precision import mixed_precision
from hueshift.training.sharing.captured import CapturedSteps, Middle
from hueshift.training.state import TrainingState, update_together
from hueshift.training.stepping import StepWork, aims, joined, with_added
from hueshift.training.unet import Maps, TrainingUNet

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What a job brings to a shared step: a batch, and the state that its gradients go to.

    Gradients are those of loss / `count`. They take the place of earlier ones in the `first` batch of a step, and the
    `last` one is followed by the optimiser's step.
    """

    work: StepWork
    state: TrainingState
    count: int = 1
    first: bool = True
    last: bool = True

    @property
    def size(self) -> int:
        """UNet rows."""
        return self.work.noisy.shape[0]


class SharedStep:
    """Takes the steps of several jobs of one family on one UNet, at most `max_rows` rows at a time (0: no limit).

    When memory does not suffice `release` is asked for what nobody uses, True if there was any; else the limit falls.
    With `captured` what it fits runs as a CUDA graph.
    """

    def __init__(
        self,
        unet: TrainingUNet,
        text: TextStage,
        max_rows: int = 0,
        captured: CapturedSteps | None = None,
        release: Callable[[], bool] = lambda: False,
    ) -> None:
        self._unet, self._text, self._captured = unet, text, captured
        self._release = release
        self.max_rows = max_rows

    def __call__(self, shares: Sequence[Share]) -> list[Tensor | Exception]:
        """Return the loss of each share, a detached scalar, or the exception that it meets alone too.

        States whose step this ends are updated together. On the CPU one whose loss is no finite number is left out;
        elsewhere it is not looked at, and its numbers stay its own. An update that fails is a failure of all of them.
        """
        results: list[Tensor | Exception] = []
        for group in self._groups(shares):
            results += self._take(group)
        ended = [n for n, share in enumerate(shares) if share.last and _is_sound(results[n])]
        try:
            update_together([shares[n].state for n in ended])
        except Exception as error:
            # Some of them may have moved. Raised, it would end one job, and the others would take the step once more.
            failure = error.with_traceback(None)
            results = [failure if n in ended else result for n, result in enumerate(results)]
        return results

    def _groups(self, shares: Sequence[Share]) -> list[list[Share]]:
        groups: list[list[Share]] = []
        room = 0
        for share in shares:
            if not groups or (self.max_rows and share.size > room):
                groups.append([])
                room = self.max_rows
            groups[-1].append(share)
            room -= share.size
        return groups

    def _take(self, shares: list[Share]) -> list[Tensor | Exception]:
        failure: Exception | None = None
        memory = False
        try:
            return step_together(self._unet, self._text, shares, self._captured)
        except Exception as error:
            # Without the frames, which hold the activations that the next try needs room for.
            failure = error.with_traceback(None) if len(shares) > 1 else error
            memory = lacks_memory(error)
        if memory and self._release():
            failure = None
            return self._take(shares)
        if len(shares) == 1:
            return [failure]
        rows = sum(share.size for share in shares)
        _log.warning("sharing.group_halved", jobs=len(shares), rows=rows, error=type(failure).__name__)
        if memory:
            self.max_rows = max(rows // 2, *(share.size for share in shares))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        half = len(shares) // 2
        return [*self._take(shares[:half]), *self._take(shares[half:])]


def step_together(
    unet: TrainingUNet, text: TextStage, shares: Sequence[Share], captured: CapturedSteps | None = None
) -> list[Tensor | Exception]:
    """Run text encoder and UNet once for all shares, and carry each one's loss back to the values of its state.

    Samples meet nowhere on the way, and no weight needs a gradient, so no job sees another's numbers. An exception of
    a job's own loss is that job's alone. Raises what the networks raise; no state has changed then.
    """
    works = [share.work for share in shares]
    with unet.lock:
        context, rows = joined(contexts_together(text, works)), _stacked(works)
        if captured is not None and captured.fit(works, rows, context):
            return _replay(unet, captured, shares, context, rows)
        losses = _losses(unet, works, context, rows)
        going = [n for n, loss in enumerate(losses) if isinstance(loss, Tensor) and _goes_back(loss)]
        roots = [loss / shares[n].count for n in going if isinstance(loss := losses[n], Tensor)]
        _spread([shares[n] for n in going], roots, None)
    return [loss.detach() if isinstance(loss, Tensor) else loss for loss in losses]


def _replay(
    unet: TrainingUNet, captured: CapturedSteps, shares: Sequence[Share], context: Tensor, rows: Rows
) -> list[Tensor | Exception]:
    """The same by a graph: it ends at contexts and rows, from where the gradients go on."""
    works, device = [share.work for share in shares], shares[0].work.device
    noisy, timesteps, weights, scaled = (
        to_device(joined(parts), device)
        for parts in zip(
            *(
                (w.noisy, w.timesteps, w.weights, w.weights / share.count)
                for w, share in zip(works, shares, strict=True)
            ),
            strict=True,
        )
    )
    with mixed_precision(device, works[0].precision):
        target = aims(unet, works, noisy, timesteps, context.detach())
    middle = Middle(noisy, timesteps, target, scaled, context, rows)
    errors, gradients = captured.run(unet, middle, works[0].precision)
    losses = torch.split(errors * weights, [share.size for share in shares])
    pairs = [(leaf, part.clone()) for leaf, part in zip(middle.leaves, gradients, strict=True) if leaf.requires_grad]
    _spread(shares, [leaf for leaf, _ in pairs], [part for _, part in pairs])
    return [loss.sum() for loss in losses]


def _spread(shares: Sequence[Share], roots: Sequence[Tensor], gradients: Sequence[Tensor] | None) -> None:
    """Carry gradients of `roots`, 1 where none are given, to the values of all states."""
    values = [value for share in shares for value in share.state.values.values()]
    if not roots or not values:
        return
    found = iter(torch.autograd.grad(roots, values, gradients, allow_unused=True))
    for share in shares:
        share.state.take_gradients([next(found) for _ in share.state.values], first=share.first)


def contexts_together(text: TextStage, works: Sequence[StepWork]) -> list[Tensor]:
    """Contexts [n, tokens, width] of each work, of one pass of the text encoder for all that can share it."""
    wordings = [work.wording() for work in works]
    prompts = [prompt for wording in wordings if wording is not None for prompt in wording.prompts]
    learned = [words for wording in wordings if wording is not None for words in wording.learned]
    sizes = [0 if wording is None else len(wording.prompts) for wording in wordings]
    encoded = torch.split(encode_packed(text, prompts, learned), sizes) if prompts else None
    parts = encoded or (None,) * len(works)
    return [
        work.context() if wording is None else wording.assemble(part if size else None)
        for work, wording, part, size in zip(works, wordings, parts, sizes, strict=True)
    ]


def _losses(unet: TrainingUNet, works: Sequence[StepWork], context: Tensor, rows: Rows) -> list[Tensor | Exception]:
    first, begins = works[0], [0, *accumulate(work.noisy.shape[0] for work in works)]
    watched = frozenset[str]().union(*(work.watched for work in works if work.halves))
    halves = tuple(begin + row for begin, work in zip(begins, works, strict=False) for row in work.halves)
    noisy, timesteps, weights = (
        to_device(joined(parts), first.device)
        for parts in zip(*((work.noisy, work.timesteps, work.weights) for work in works), strict=True)
    )
    with mixed_precision(first.device, first.precision):
        with unet.watching(watched, halves) as maps:
            output = unet(noisy, timesteps, context, rows)
        target = aims(unet, works, noisy, timesteps, context)
    losses: list[Tensor | Exception] = []
    for work, begin, end in zip(works, begins, begins[1:], strict=False):
        pixels = None if work.pixel_weights is None else to_device(work.pixel_weights, work.device)
        own: Maps = {
            name: {row: by_row[begin + row] for row in work.halves}
            for name, by_row in maps.items()
            if name in work.watched
        }
        try:
            loss = denoising_loss(target[begin:end], weights[begin:end], output[begin:end], pixels)
            losses.append(with_added(loss, work, own))
        except Exception as error:
            if lacks_memory(error):
                raise
            losses.append(error)
    return losses


def _stacked(works: Sequence[StepWork]) -> Rows:
    """One row for each sample; the row itself if one job is alone, which is faster and gives its bits."""
    rows = [work.rows() for work in works]
    if len(works) == 1:
        return rows[0]
    sizes = [len(work.noisy) for work in works]
    return Rows(
        _expanded([row.spectral for row in rows], sizes),
        _expanded([row.lowrank for row in rows], sizes),
    )


def _expanded(rows: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    # Not index_select: its gradient adds in an order of its own on CUDA.
    parts = [row.expand(size, -1) for row, size in zip(rows, sizes, strict=True) if row is not None]
    return torch.cat(parts) if parts else None


def _goes_back(loss: Tensor) -> bool:
    return loss.requires_grad and _is_sound(loss)


def _is_sound(loss: Tensor | Exception) -> bool:
    """Looked at on the CPU alone, where it costs nothing."""
    return isinstance(loss, Tensor) and (loss.device.type != "cpu" or bool(loss.detach().isfinite()))
