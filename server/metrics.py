"""The metrics, on a registry of their own that is passed in. Labels come from bounded sets only.

No tenant, adapter or prompt text is ever a label. One serving process holds them all; workers report through the job
table, so client_python's multiprocess mode (which loses collectors and label removal) is not needed.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

# A 128-pixel picture takes a second on a CPU, a large one minutes on a busy GPU.
_REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 600)
_STEP_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
_SWAP_BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
_BATCH_BUCKETS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)


class Metrics:
    """All metric families. Attributes are named as the families, without prefix and suffix."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        r = registry
        self.requests = Counter("hueshift_requests", "Calls ended.", ["method", "code"], registry=r)
        self.requests_in_flight = Gauge("hueshift_requests_in_flight", "Calls running now.", ["method"], registry=r)
        self.request_seconds = Histogram(
            "hueshift_request_seconds", "Time of a call.", ["method"], buckets=_REQUEST_BUCKETS, registry=r
        )
        self.queue_depth = Gauge("hueshift_queue_depth", "Pictures waiting for a place in the batch.", registry=r)
        self.queue_tenants = Gauge("hueshift_queue_tenants", "Tenants with pictures waiting.", registry=r)
        self.queue_oldest_seconds = Gauge(
            "hueshift_queue_oldest_seconds", "Age of the oldest waiting picture.", registry=r
        )
        self.active_samples = Gauge("hueshift_active_samples", "Pictures being denoised.", registry=r)
        self.stage_seconds = Histogram(
            "hueshift_stage_seconds",
            "Time of a picture in a stage: queue, adapter_load, text, picture, inversion, denoise, decode.",
            ["stage"],
            buckets=_REQUEST_BUCKETS,
            registry=r,
        )
        self.step_seconds = Histogram(
            "hueshift_step_seconds",
            "Time of a denoising step of the whole batch.",
            ["plan"],
            buckets=_STEP_BUCKETS,
            registry=r,
        )
        self.step_loop_seconds = Counter(
            "hueshift_step_loop_seconds", "Time of the step loop while it has pictures.", registry=r
        )
        self.step_call_seconds = Counter(
            "hueshift_step_call_seconds",
            "Of that, time in which the engine worked; the ratio of both, less 1, is the service's overhead.",
            registry=r,
        )
        self.batch_rows = Histogram(
            "hueshift_batch_rows", "UNet rows per step.", ["plan"], buckets=_BATCH_BUCKETS, registry=r
        )
        self.batch_adapters = Histogram(
            "hueshift_batch_adapters", "Distinct adapter mixes per step.", buckets=_BATCH_BUCKETS, registry=r
        )
        self.batch_splits = Counter(
            "hueshift_batch_splits",
            "Steps of a batch in several calls: cost (that is cheaper), memory (one call did not fit).",
            ["reason"],
            registry=r,
        )
        self._add_adapters_and_jobs(registry)
        self._add_engine(registry)

    def failed(self, task: str) -> None:
        """Count a failed round of a task in the background."""
        self.background_failures.labels(task).inc()

    def outage(self, task: str, lasts: bool) -> None:
        """Note whether a task in the background keeps failing."""
        self.background_failing.labels(task).set(lasts)

    def swept(self, kind: str, count: int) -> None:
        """Count what a sweep of the store removed: rows of a kind, or `bytes` of files."""
        if kind == "bytes":
            self.store_swept_bytes.inc(count)
        else:
            self.store_swept.labels(kind).inc(count)

    def _add_adapters_and_jobs(self, r: CollectorRegistry) -> None:
        self.swap_seconds = Histogram(
            "hueshift_swap_seconds", "Time to bring a row into a slot.", ["tier"], buckets=_SWAP_BUCKETS, registry=r
        )
        self.cache_hits = Counter("hueshift_adapter_cache_hits", "Rows found in the tier.", ["tier"], registry=r)
        self.cache_misses = Counter(
            "hueshift_adapter_cache_misses", "Rows not found in the tier.", ["tier"], registry=r
        )
        self.cache_evictions = Counter("hueshift_adapter_cache_evictions", "Rows evicted.", ["tier"], registry=r)
        self.cache_bytes = Gauge("hueshift_adapter_cache_bytes", "Bytes held.", ["tier"], registry=r)
        self.cache_entries = Gauge("hueshift_adapter_cache_entries", "Rows held.", ["tier"], registry=r)
        self.images = Counter("hueshift_images", "Pictures sent.", registry=r)
        self.samples_ended = Counter(
            "hueshift_samples_ended",
            "Pictures that left the batch: done, cancelled, deadline, failed.",
            ["outcome"],
            registry=r,
        )
        self.jobs = Gauge("hueshift_jobs", "Fine-tuning jobs by state.", ["state"], registry=r)
        self.job_steps_left = Gauge(
            "hueshift_job_steps_left", "Training steps still to do, of jobs that wait or run.", registry=r
        )
        self.job_leases_lost = Counter("hueshift_job_leases_lost", "Leases that expired.", registry=r)
        self.job_retries = Counter("hueshift_job_retries", "Failed jobs that were queued again.", registry=r)
        self.workers = Gauge("hueshift_workers", "Worker processes alive.", registry=r)

    def _add_engine(self, r: CollectorRegistry) -> None:
        self.engine_parity_error = Gauge(
            "hueshift_engine_parity_error", "Largest error of the exported graph against torch.", ["plan"], registry=r
        )
        self.engine_fallbacks = Counter(
            "hueshift_engine_fallbacks",
            "Times torch, or the other plans, took over from TensorRT.",
            ["reason"],
            registry=r,
        )
        self.engine_build_progress = Gauge(
            "hueshift_engine_build_progress", "Share of a start-up stage done, 0 to 1.", ["stage"], registry=r
        )
        self.replicas = Gauge("hueshift_replicas", "Replicas that a front end knows to be alive.", registry=r)
        self.routed = Counter(
            "hueshift_routed",
            "Calls that a front end passed on: affine, spread (the affine replica was too busy), any, retried, lost.",
            ["outcome"],
            registry=r,
        )
        self.engine_captures = Counter(
            "hueshift_engine_captures", "CUDA graphs captured; constant once sizes are known.", ["network"], registry=r
        )
        self.engine_compiles = Counter(
            "hueshift_engine_compiles", "Networks compiled for a shape, at start only.", ["network"], registry=r
        )
        self.engine_merges = Counter("hueshift_engine_merges", "Adapter mixes written into weights.", registry=r)
        self.engine_capacity_rows = Gauge(
            "hueshift_engine_capacity_rows", "UNet rows of one call that fit, by warmed size.", ["size"], registry=r
        )
        self.device_free_bytes = Gauge(
            "hueshift_device_free_bytes", "Device memory that nothing held after warm-up.", registry=r
        )
        self.stored_bytes = Gauge(
            "hueshift_stored_bytes",
            "Bytes stored of all tenants together: adapters, pictures; counted every few minutes.",
            ["kind"],
            registry=r,
        )
        self.store_swept = Counter(
            "hueshift_store_swept",
            "Rows removed by age or number: answers, days, samples (their pictures), events, jobs, revisions.",
            ["kind"],
            registry=r,
        )
        self.store_swept_bytes = Counter(
            "hueshift_store_swept_bytes", "Bytes of adapter files that cleaning removed.", registry=r
        )
        self.background_failures = Counter(
            "hueshift_background_failures",
            "Rounds that failed: jobs, job_folders, worker, housekeeping, stored_bytes, pins, announce, replicas.",
            ["task"],
            registry=r,
        )
        self.background_failing = Gauge(
            "hueshift_background_failing", "1 while the last round of such a task failed.", ["task"], registry=r
        )
        self.internal_errors = Counter("hueshift_internal_errors", "Answers with an incident id.", registry=r)
        self.build = Info("hueshift_build", "Version, engine and base model.", registry=r)
