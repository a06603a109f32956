"""Merged weights on CUDA: a few copies of the adapted weights, each of one mix, written beside the running steps.

A burst of one adapter then runs at the base's own speed. Writing takes a lane of its own, so the steps of others go on
meanwhile; SD1.5's weights take 1.7 GB a copy, and the packed factors 2.2 GB once.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from hueshift.adapters.layout import BaseLayout
from hueshift.engines.cuda_lane import GraphLane, Mark, Work
from hueshift.engines.interface import EngineRow
from hueshift.engines.merged_weights import WeightWriter, WrittenMatrix, written_matrix
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text_side import is_text_side

BASE_ROLE = "merged base"


@dataclass(slots=True)
class WeightSlot:
    """One copy of the weights: the network that reads it and what writes it. `slot` is whose weights it holds."""

    role: str
    network: nn.Module
    write: Callable[[EngineRow], None]
    slot: int | None = None
    written: Mark | None = None
    used: Mark | None = None


class MergedSlots:
    """Which mix's weights are where. For the thread that runs the engine.

    `lane` runs the steps; merging has one beside it. `networks` run without branches, one for each weight slot, and
    their parameters are replaced by weights of their own; `pristine` is the network whose weights are the base's.
    """

    def __init__(
        self,
        layout: BaseLayout,
        rows: RowLayout,
        factors: SpectralFactors,
        pristine: nn.Module,
        networks: list[nn.Module],
        lane: GraphLane,
        *,
        capture: bool,
    ) -> None:
        self._lane, self._aside = lane, lane.beside()
        self._held: OrderedDict[int, WeightSlot] = OrderedDict()
        self._free: list[WeightSlot] = []
        self._loaded: dict[int, Mark] = {}
        # Slots whose weights stay until another row is loaded there: nothing else can serve them.
        self._kept: set[int] = set()
        weights = dict(pristine.named_parameters())
        writer: WeightWriter | None = None
        for number, network in enumerate(networks):
            # The first packs the factors, and the others write with its packed ones.
            matrices, norms = own_weights(layout, factors if number == 0 else None, weights, network)
            writer = WeightWriter(layout, rows, matrices, norms, like=writer)
            write = self._writing(writer, capture=capture)
            self._free.append(WeightSlot(f"merged {number}", network, write))
        self.count = len(self._free)
        self.merges = 0

    @property
    def slots(self) -> list[WeightSlot]:
        """All of them."""
        return [*self._free, *self._held.values()]

    @property
    def kept(self) -> frozenset[int]:
        """Slots whose weights stay whatever is merged."""
        return frozenset(self._kept)

    @property
    def ready(self) -> frozenset[int]:
        """Slots whose weights are written."""
        return frozenset(slot for slot, held in self._held.items() if held.written is not None and held.written.done())

    @property
    def writing(self) -> frozenset[int]:
        """Slots whose weights are being written."""
        return frozenset(self._held) - self.ready

    def keep(self, slot: int, row: EngineRow) -> None:
        """Begin to write the weights of `row`, which `slot` holds, and keep them until another is loaded there.

        Raises RuntimeError if all copies are kept for others.
        """
        self.merge(slot, row)
        if slot not in self._held:
            raise RuntimeError(f"all {self.count} copies of the weights are kept for slots {sorted(self._kept)}")
        self._kept.add(slot)

    def merge(self, slot: int, row: EngineRow) -> None:
        """Begin to write the weights of `row`, which `slot` holds.

        If they are written or being written this only counts as a use, so that others make room first. Where all
        copies are kept for others it does nothing.
        """
        if slot in self._held:
            self._held.move_to_end(slot)
            return
        if not self._free:
            oldest = next((held for held in self._held if held not in self._kept), None)
            if oldest is None:
                return
            evicted = self._held.pop(oldest)
            evicted.slot = evicted.written = None
            self._free.append(evicted)
        # It stays free until all is queued: a write that fails must not take the place away for good.
        target = self._free[-1]
        with self._aside.apart():
            # After the last step that read these weights, and after the row's copy into its slot.
            for mark in (target.used, self._loaded.get(slot)):
                if mark is not None:
                    self._aside.after(mark)
            target.write(row)
            target.written = self._aside.mark()
        target.slot = slot
        self._held[slot] = self._free.pop()
        self.merges += 1

    def finish(self) -> None:
        """Let the steps' lane wait for every merge that has begun."""
        for held in self._held.values():
            if held.written is not None:
                self._lane.after(held.written)

    def use(self, slot: int) -> WeightSlot:
        """The weights of a slot for one call, queued on the steps' lane. Raises KeyError if nothing was merged."""
        held = self._held[slot]
        self._held.move_to_end(slot)
        if held.written is not None:
            self._lane.after(held.written)
        return held

    def used(self, held: WeightSlot) -> None:
        """Count the call that `use` was for, once it is queued."""
        held.used = self._lane.mark()

    def loaded(self, slot: int, arrived: Mark) -> None:
        """The row of a slot was replaced, from `arrived` on: its merged weights are of no use any more."""
        self._loaded[slot] = arrived
        self._kept.discard(slot)
        held = self._held.pop(slot, None)
        if held is not None:
            if held.written is not None:
                # Whoever writes here next does so on the same lane, so after this.
                held.written = None
            held.slot = None
            self._free.append(held)

    def _writing(self, writer: WeightWriter, *, capture: bool) -> Callable[[EngineRow], None]:
        """A function that writes a row: the copy of the row, then the launches, as one graph where it can be.

        Whole deltas are added after it, layer by layer: 1.7 GB of SD1.5 come from the host meanwhile.
        """
        launch: Work = writer.launch
        if capture:
            # The tables and the weights were written on the lane that this runs in.
            self._aside.after(self._lane.mark())
            with self._aside.apart():
                launch()
            launch = self._aside.capture(writer.launch)

        def write(row: EngineRow) -> None:
            writer.take(row)
            launch()
            writer.add(row.dense or {})

        return write


def own_weights(
    layout: BaseLayout, factors: SpectralFactors | None, pristine: Mapping[str, Tensor], network: nn.Module
) -> tuple[list[WrittenMatrix], dict[str, Tensor]]:
    """Give a network weights of its own where adapters write, and the pristine ones elsewhere.

    `pristine` are the base's parameters by the network's names (`unet.<layer>.weight`). Returns what writes them;
    without `factors`, for a writer that shares another's, their places are hollow.
    """
    matrices: list[WrittenMatrix] = []
    norms: dict[str, Tensor] = {}
    adapted = [matrix.name for matrix in layout.matrices] + [norm.name for norm in layout.norms]
    written = {f"unet.{name}.weight" for name in adapted}
    for name in [name for name, _ in network.named_parameters()]:
        out = pristine[name].detach().clone() if name in written else pristine[name].detach()
        parent, _, key = name.rpartition(".")
        setattr(network.get_submodule(parent), key, nn.Parameter(out, requires_grad=False))
    parameters = dict(network.named_parameters())
    for matrix in layout.matrices:
        if is_text_side(matrix.name):
            continue
        base, out = (weights[f"unet.{matrix.name}.weight"].detach() for weights in (pristine, parameters))
        matrices.append(written_matrix(matrix, layout, factors, base, out))
    for norm in layout.norms:
        norms[norm.name] = parameters[f"unet.{norm.name}.weight"].detach()
    return matrices, norms
