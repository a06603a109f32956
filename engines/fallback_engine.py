"""An engine that torch replaces, without losing a row or a call, once TensorRT refuses to go on."""

from collections.abc import Callable, Mapping

import structlog
from torch import Tensor

from hueshift.engines.interface import BASE_SLOT, EngineRow, Guides, Plan, UNetEngine
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.tensorrt_engine import TensorRtEngine
from hueshift.engines.tensorrt_loader import Fallback, TensorRtError

_log = structlog.get_logger()
OnFallback = Callable[[Fallback], None]


class FallbackEngine:
    """TensorRT until a call fails, torch from then on: the failed call is answered by torch. Implements UNetEngine."""

    rows: RowLayout
    factors: SpectralFactors
    norms: Mapping[str, Tensor]

    def __init__(self, first: TensorRtEngine, make_second: Callable[[], UNetEngine], on_fallback: OnFallback) -> None:
        self.rows = first.rows
        self.factors = first.factors
        self.norms = first.norms
        self._tensorrt: TensorRtEngine | None = first
        self._engine: UNetEngine = first
        self._make_second = make_second
        self._on_fallback = on_fallback

    @property
    def name(self) -> str:
        """Name of the engine that serves now."""
        return self._engine.name

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Plans it can run."""
        return self._engine.plans

    @property
    def slots(self) -> int:
        """Slots in all, the base's own included."""
        return self._engine.slots

    @property
    def max_batch(self) -> int:
        """Largest number of UNet rows in one call."""
        return self._engine.max_batch

    def load_row(self, slot: int, row: EngineRow) -> None:
        """Copy a row into a slot; see UNetEngine."""
        self._engine.load_row(slot, row)

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
            return self._engine.denoise(plan, latents, timesteps, cross, adapter_index, added)
        except TensorRtError as error:
            if self._tensorrt is None:
                raise
            self._replace(self._tensorrt, error)
        return self._engine.denoise(plan, latents, timesteps, cross, adapter_index, added)

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
        return self._engine.denoise_guided(latents, timesteps, cross, adapter_index, guides, added)

    def warm(self) -> None:
        """Run every plan once."""
        try:
            self._engine.warm()
        except TensorRtError as error:
            if self._tensorrt is None:
                raise
            self._replace(self._tensorrt, error)
            self._engine.warm()

    def _replace(self, first: TensorRtEngine, error: TensorRtError) -> None:
        report_fallback(error, self._on_fallback)
        second = self._make_second()
        for slot in range(BASE_SLOT + 1, first.slots):
            second.load_row(slot, first.row(slot))
        self._engine, self._tensorrt = second, None


def report_fallback(error: TensorRtError, on_fallback: OnFallback) -> None:
    """Say in the log and to the metric that torch serves now, and why."""
    _log.error("engine_fallback", engine="tensorrt", serves="torch", reason=error.fallback.value, error=error.message)
    on_fallback(error.fallback)
