"""An engine that torch replaces, without losing a row or a call, once TensorRT refuses to go on."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence

import structlog
from torch import Tensor

from hueshift.engines.device_errors import NoEngineError, release_memory
from hueshift.engines.interface import (
    BASE_SLOT,
    EngineRow,
    Guides,
    MeasuredEngine,
    Plan,
    RunsAhead,
    UNetEngine,
    dense_in,
    dense_slots,
)
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.tensorrt_engine import TensorRtEngine
from hueshift.engines.tensorrt_loader import Fallback, TensorRtError

_log = structlog.get_logger()
OnFallback = Callable[[Fallback], None]


class FallbackEngine:
    """TensorRT until a call fails, torch from then on: the failed call is answered by torch. Implements UNetEngine.

    The requests that run meanwhile wait for the change, so `make_second` should be quick: an engine that is not warm
    serves in seconds and warms with use, where capturing everything first would let minutes of deadlines pass. The
    first engine's memory is given back before, because the device may not hold both.
    """

    rows: RowLayout
    factors: SpectralFactors
    norms: Mapping[str, Tensor]

    def __init__(self, first: TensorRtEngine, make_second: Callable[[], UNetEngine], on_fallback: OnFallback) -> None:
        self.rows = first.rows
        self.factors = first.factors
        self.norms = first.norms
        self.slots = first.slots
        """Slots in all, the base's own included."""
        self.max_batch = first.max_batch
        """Largest number of UNet rows in one call."""
        self._tensorrt: TensorRtEngine | None = first
        self._second: UNetEngine | None = None
        self._make_second = make_second
        self._on_fallback = on_fallback

    @property
    def serving(self) -> UNetEngine:
        """The engine that serves now. Raises NoEngineError if neither can."""
        engine = self._present
        if engine is None:
            raise NoEngineError("TensorRT has failed, and torch's engine could not take over; start the server again")
        return engine

    @property
    def _present(self) -> UNetEngine | None:
        # Other threads look too: whoever asks it something asks the one object that this returned.
        return self._tensorrt or self._second

    @property
    def name(self) -> str:
        """Name of the engine that serves now, or of the one that failed if none does."""
        engine = self._present
        return TensorRtEngine.name if engine is None else engine.name

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Plans it can run: while one engine takes over from the other, those of the first, as requests that come
        meanwhile are checked in other threads and only have to wait."""
        engine = self._present
        return TensorRtEngine.plans if engine is None else engine.plans

    @property
    def buckets(self) -> Sequence[int]:
        """Rows that calls are filled up to, see MeasuredEngine; empty if the engine that serves does not say."""
        engine = self._present
        return engine.buckets if isinstance(engine, MeasuredEngine) else ()

    @property
    def capacity(self) -> Mapping[tuple[int, int], int]:
        """UNet rows of one call that fit, by latent size; empty as well."""
        engine = self._present
        return engine.capacity if isinstance(engine, MeasuredEngine) else {}

    @property
    def dense_slots(self) -> int:
        """Mixes with dense deltas that the engine which serves now holds at a time; see WholeWeightEngine."""
        engine = self._present
        return 0 if engine is None else dense_slots(engine)

    @property
    def dense(self) -> frozenset[int]:
        """Slots that hold one."""
        engine = self._present
        return frozenset() if engine is None else dense_in(engine)

    @property
    def working(self) -> bool:
        """True while the device still has calls to do; see RunsAhead."""
        engine: object = self._present
        return isinstance(engine, RunsAhead) and engine.working

    def load_row(self, slot: int, row: EngineRow) -> None:
        """Copy a row into a slot; see UNetEngine."""
        self.serving.load_row(slot, row)

    def denoise(
        self,
        plan: Plan,
        latents: Tensor,
        timesteps: Tensor,
        cross: Tensor,
        adapter_index: Tensor,
        added: Tensor | None = None,
    ) -> Tensor:
        """Run the UNet once; see UNetEngine."""
        try:
            return self.serving.denoise(plan, latents, timesteps, cross, adapter_index, added)
        except TensorRtError as error:
            if self._tensorrt is None:
                raise
            report_fallback(error, self._on_fallback)
        # Not above: while the error is being handled, its traceback holds the engine whose memory is needed.
        self._replace()
        return self.serving.denoise(plan, latents, timesteps, cross, adapter_index, added)

    def denoise_guided(
        self,
        latents: Tensor,
        timesteps: Tensor,
        cross: Tensor,
        adapter_index: Tensor,
        guides: Guides,
        added: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the full plan once; see UNetEngine."""
        return self.serving.denoise_guided(latents, timesteps, cross, adapter_index, guides, added)

    def warm(self) -> None:
        """Run every plan once."""
        try:
            self.serving.warm()
            return
        except TensorRtError as error:
            if self._tensorrt is None:
                raise
            report_fallback(error, self._on_fallback)
        self._replace()
        self.serving.warm()

    def _replace(self) -> None:
        """Let torch's engine take over every row. Raises NoEngineError if it cannot be made."""
        first, begin = self._tensorrt, time.perf_counter()
        if first is None:
            return
        rows = {slot: _on_host(first.row(slot)) for slot in range(BASE_SLOT + 1, first.slots)}
        self._tensorrt = first = None
        # Contexts, plans and buffers of TensorRT hold each other; a server keeps what it began with from collection.
        gc.unfreeze()
        gc.collect()
        release_memory()
        try:
            second = self._make_second()
            for slot, row in rows.items():
                second.load_row(slot, row)
        except Exception as error:
            _log.critical("engine_takeover_failed", engine="tensorrt", error=str(error))
            raise NoEngineError("TensorRT has failed, and torch's engine could not take over") from error
        self._second = second
        _log.warning(
            "engine_taken_over",
            engine=second.name,
            seconds=time.perf_counter() - begin,
            rows=len(rows),
            note="running requests waited for it; each batch shape is slow at first, and plans of the start are "
            "missing until the server starts again",
        )


def _on_host(row: EngineRow) -> EngineRow:
    """A copy of a row outside of the device's memory."""
    return row.each(lambda part: part.to("cpu", copy=True))


def report_fallback(error: TensorRtError, on_fallback: OnFallback) -> None:
    """Say in the log and to the metric that torch serves now, and why."""
    _log.error("engine_fallback", engine="tensorrt", serves="torch", reason=error.fallback.value, error=error.message)
    on_fallback(error.fallback)
