"""One forward and one backward pass of the UNet for several jobs' works."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import structlog
import torch
from torch import Tensor

from hueshift.training.methods.learnable import Rows
from hueshift.training.precision import mixed_precision
from hueshift.training.stepping import Stepped, StepWork, base_output
from hueshift.training.unet import Maps, TrainingUNet

_log = structlog.get_logger()
_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What a job brings to a shared step: its work, and by what the gradient of its loss is divided."""

    work: StepWork
    count: int

    @property
    def size(self) -> int:
        """UNet rows."""
        return self.work.noisy.shape[0]


class SharedStep:
    """Takes the steps of several jobs of one family on one UNet, at most `max_rows` rows at a time (0: no limit).

    The limit falls when memory does not suffice.
    """

    def __init__(self, unet: TrainingUNet, max_rows: int = 0) -> None:
        self._unet = unet
        self.max_rows = max_rows

    def __call__(self, shares: Sequence[Share]) -> list[Stepped | Exception]:
        """Return the step of each share, or the exception that it meets alone too."""
        results: list[Stepped | Exception] = []
        for group in self._groups(shares):
            results += self._take(group)
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

    def _take(self, shares: list[Share]) -> list[Stepped | Exception]:
        failure: Exception | None = None
        try:
            return step_together(self._unet, shares)
        except Exception as error:
            # Without the frames, which hold the activations that the next try needs room for.
            failure = error.with_traceback(None) if len(shares) > 1 else error
            memory = isinstance(error, _OUT_OF_MEMORY)
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


def step_together(unet: TrainingUNet, shares: Sequence[Share]) -> list[Stepped | Exception]:
    """Run the UNet once for all shares, each with its rows, and carry each one's loss back to its rows and context.

    Samples meet nowhere in the UNet, whose weights need no gradients, so no job sees another's. A loss that is no
    finite number goes no way back, and an exception of a job's loss is that job's alone. Raises what the UNet raises.
    """
    leaves = [_detached(share.work) for share in shares]
    with unet.lock:
        output, base, maps = _forward(unet, leaves)
        losses = _losses(shares, output, base, maps)
        made = {number: loss for number, loss in enumerate(losses) if isinstance(loss, Tensor)}
        finite = torch.stack([loss.detach().isfinite() for loss in made.values()]).tolist() if made else []
        sound = [n for (n, loss), good in zip(made.items(), finite, strict=True) if good and loss.requires_grad]
        wanted = {n: [leaf for leaf in _roots(leaves[n]) if leaf.requires_grad] for n in sound}
        gradients = _gradients([made[n] / shares[n].count for n in sound], [leaf for n in sound for leaf in wanted[n]])
    results: list[Stepped | Exception] = []
    for number, (share, loss) in enumerate(zip(shares, losses, strict=True)):
        if not isinstance(loss, Tensor):
            results.append(loss)
            continue
        pairs: list[tuple[Tensor, Tensor]] = []
        for root in _roots(share.work) if number in wanted else ():
            if root.requires_grad and (gradient := next(gradients)) is not None:
                pairs.append((root, gradient))
        results.append(Stepped(loss.detach(), tuple(r for r, _ in pairs), tuple(g for _, g in pairs)))
    return results


def _forward(unet: TrainingUNet, works: list[StepWork]) -> tuple[Tensor, Tensor | None, Maps]:
    first = works[0]
    watched = frozenset[str]().union(*(work.watched for work in works if work.halves))
    halves = tuple(begin + row for begin, work in zip(_begins(works), works, strict=True) for row in work.halves)
    with mixed_precision(first.noisy.device, first.precision):
        with unet.watching(watched, halves) as maps:
            output = unet(
                torch.cat([work.noisy for work in works]),
                torch.cat([work.timesteps for work in works]),
                torch.cat([work.context for work in works]),
                _stacked(works),
            )
        return output, base_output(unet, works), maps


def _losses(shares: Sequence[Share], output: Tensor, base: Tensor | None, maps: Maps) -> list[Tensor | Exception]:
    losses: list[Tensor | Exception] = []
    begin = anchor = 0
    for share in shares:
        work, end = share.work, begin + share.size
        own_base = None
        if work.base_rows is not None and base is not None:
            own_base = base[anchor : anchor + len(work.anchored)]
            anchor += len(work.anchored)
        own_maps: Maps = {
            name: {row: by_row[begin + row] for row in work.halves}
            for name, by_row in maps.items()
            if name in work.watched
        }
        try:
            losses.append(work.loss_of(output[begin:end], own_base, own_maps))
        except _OUT_OF_MEMORY:
            raise
        except Exception as error:
            losses.append(error)
        begin = end
    return losses


def _begins(works: Sequence[StepWork]) -> list[int]:
    """Where each work's rows begin in the batch."""
    return [0, *accumulate(work.noisy.shape[0] for work in works[:-1])]


def _detached(work: StepWork) -> StepWork:
    """The same work on leaves: the job's own graph is not to be walked by another thread."""
    rows = Rows(_leaf(work.rows.spectral), _leaf(work.rows.lowrank))
    return replace(work, rows=rows, context=work.context.detach().requires_grad_(work.context.requires_grad))


def _leaf(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().requires_grad_(tensor.requires_grad)


def _roots(work: StepWork) -> list[Tensor]:
    """Tensors of a work that may need a gradient."""
    return [tensor for tensor in (work.rows.spectral, work.rows.lowrank, work.context) if tensor is not None]


def _stacked(works: Sequence[StepWork]) -> Rows:
    """One row for each sample; the row itself if one job is alone, which is faster and gives its bits."""
    if len(works) == 1:
        return works[0].rows
    return Rows(
        _expanded([(work.rows.spectral, len(work.noisy)) for work in works]),
        _expanded([(work.rows.lowrank, len(work.noisy)) for work in works]),
    )


def _expanded(rows: Sequence[tuple[Tensor | None, int]]) -> Tensor | None:
    # Not index_select: its gradient adds in an order of its own on CUDA.
    parts = [row.expand(count, -1) for row, count in rows if row is not None]
    return torch.cat(parts) if parts else None


def _gradients(losses: Sequence[Tensor], leaves: Sequence[Tensor]) -> Iterator[Tensor | None]:
    return iter(torch.autograd.grad(losses, leaves, allow_unused=True) if losses and leaves else ())
