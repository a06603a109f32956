"""The host tier: whole adapters in memory by content hash, and the row tier: rows composed of them, by mix."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from hueshift.adapters.adapter import Adapter
from hueshift.engines.interface import EngineRow
from hueshift.engines.mixes import Mix
from hueshift.engines.residency_tiers import FlightCache, ResidencyObserver, Tier
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text_side import TextSide, compose_text_side
from hueshift.engines.transfer import pin_together, pinned_bytes


class HostCache(FlightCache[str, Adapter]):
    """Adapters by content hash; see FlightCache."""

    def __init__(self, load: Callable[[str], Adapter], max_bytes: int, observer: ResidencyObserver) -> None:
        super().__init__(Tier.HOST, load, max_bytes, observer)

    def drop(self, content_hashes: Iterable[str]) -> None:
        """Forget adapters."""
        gone = set(content_hashes)
        self.drop_where(gone.__contains__)


@dataclass(frozen=True, slots=True, eq=False)
class ComposedMix:
    """A mix as the engine's row and what its adapters teach the text side, and the bytes of memory that both take.

    Many may share it, so nobody changes it.
    """

    row: EngineRow
    text: TextSide
    nbytes: int


class RowCache(FlightCache[Mix, ComposedMix]):
    """Composed rows by mix: a mix that lost its slot comes back with one copy, whatever its adapters took to compose.

    With `pinned` rows lie in page-locked memory, from which a GPU copies without holding up the host, and so do whole
    changes of keys and values (77 MB in SD1.5). `max_bytes` are what that takes, not what is in it.
    """

    def __init__(
        self,
        host: HostCache,
        rows: RowLayout,
        factors: SpectralFactors,
        norms: Mapping[str, Tensor],
        max_bytes: int,
        observer: ResidencyObserver,
        *,
        pinned: bool = False,
    ) -> None:
        super().__init__(Tier.ROWS, self._compose, max_bytes, observer)
        self._host = host
        self._rows, self._factors, self._norms = rows, factors, norms
        self._pinned = pinned

    @property
    def host(self) -> HostCache:
        """The tier below."""
        return self._host

    def drop(self, content_hashes: Iterable[str]) -> None:
        """Forget adapters, here and below, and every row that was made of one of them."""
        gone = set(content_hashes)
        self._host.drop(gone)
        self.drop_where(lambda mix: any(content_hash in gone for content_hash, _ in mix))

    def _compose(self, mix: Mix) -> ComposedMix:
        weighted = [(self._host.get(content_hash), weight) for content_hash, weight in mix]
        row = self._rows.compose(weighted, self._factors, self._norms)
        text = compose_text_side(weighted, self._factors)
        return _pin(row, text) if self._pinned else ComposedMix(row, text, row.nbytes + text.nbytes)


def _pin(row: EngineRow, text: TextSide) -> ComposedMix:
    """Copy what is large to page-locked memory."""
    vectors = EngineRow(row.spectral, row.lowrank).each(Tensor.pin_memory)
    dense = None if row.dense is None else pin_together(row.dense)
    deltas = pin_together(text.edits.deltas)
    blocks = [part.nbytes for part in vectors.tensors()]
    blocks += [sum(delta.nbytes for delta in group.values()) for group in (deltas, dense or {})]
    rounded = sum(pinned_bytes(block) - block for block in blocks)
    text = replace(text, edits=replace(text.edits, deltas=deltas))
    return ComposedMix(replace(vectors, dense=dense), text, row.nbytes + text.nbytes + rounded)
