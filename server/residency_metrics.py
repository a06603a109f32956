"""What the adapter caches do, as metrics."""

from hueshift.engines.residency_tiers import Tier
from hueshift.server.metrics import Metrics


class ResidencyMetrics:
    """A ResidencyObserver over the metrics; the tier is the label."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        for tier in Tier:
            metrics.cache_hits.labels(tier)
            metrics.cache_misses.labels(tier)
            metrics.cache_evictions.labels(tier)
            self.holds(tier, 0, 0)

    def looked_up(self, tier: Tier, *, hit: bool) -> None:
        """Count a hit or a miss."""
        (self._metrics.cache_hits if hit else self._metrics.cache_misses).labels(tier).inc()

    def loaded(self, tier: Tier, seconds: float) -> None:
        """Time a load."""
        self._metrics.swap_seconds.labels(tier).observe(seconds)

    def evicted(self, tier: Tier) -> None:
        """Count an eviction."""
        self._metrics.cache_evictions.labels(tier).inc()

    def holds(self, tier: Tier, entries: int, nbytes: int) -> None:
        """Set what the tier holds."""
        self._metrics.cache_entries.labels(tier).set(entries)
        self._metrics.cache_bytes.labels(tier).set(nbytes)
