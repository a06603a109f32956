"""What an engine does beside its steps, as metrics."""

from hueshift.server.metrics import Metrics


class EngineMetrics:
    """An EngineObserver over the metrics. Its labels are bounded: networks are few, warmed sizes are settings."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def captured(self, role: str) -> None:
        """Count a captured call."""
        self._metrics.engine_captures.labels(role).inc()

    def compiled(self, role: str) -> None:
        """Count a network compiled for a shape."""
        self._metrics.engine_compiles.labels(role).inc()

    def merge_began(self) -> None:
        """Count a merge."""
        self._metrics.engine_merges.inc()

    def capacity(self, size: tuple[int, int], rows: int, free_bytes: int | None) -> None:
        """Set what fits at a latent size."""
        self._metrics.engine_capacity_rows.labels(f"{size[0]}x{size[1]}").set(rows)
        if free_bytes is not None:
            self._metrics.device_free_bytes.set(free_bytes)
