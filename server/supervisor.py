"""Starts the worker processes of one server, restarts those that die, and stops them with it.

Each worker gets the settings as one line on its standard input, which then stays open: when the server is killed the
kernel closes it, and the worker puts its job back and ends. A dead worker's job is put back at once, without waiting
for its lease, because the supervisor has seen the process end.
"""

import asyncio
import contextlib
import os
import secrets
import socket
import sys
from collections.abc import Sequence
from functools import partial

import structlog

from hueshift.server.clock import Clock
from hueshift.server.devices import worker_environment
from hueshift.server.job_folders import JobFolders
from hueshift.server.metrics import Metrics
from hueshift.server.rounds import keep_doing, try_once
from hueshift.server.settings import Settings, TrainingSettings
from hueshift.server.store.job_store import JobStore

_LOG = structlog.get_logger()
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 30.0
# A worker that lived this long was no start-up failure.
_HEALTHY_SECONDS = 60.0
_LOOK_SECONDS = 1.0
_SWEEP_SECONDS = 600.0
# Longer than any upload: a folder of an unfinished CreateFineTune is never swept.
_SWEEP_AGE = 3600.0

# OpenMP's threads wait for each other by spinning, which takes the core from whoever they wait for. On two cores shared
# with seven other processes, convolutions ran at 10.8 a second instead of 3.5 without it (2-core x86 CPU, 2026-11-20).
# What the operator sets in the environment wins.
_WAITING = {"OMP_WAIT_POLICY": "passive"}

WORKER_COMMAND = (sys.executable, "-P", "-m", "hueshift.server.cli.worker", "--supervised")


def worker_devices(training: TrainingSettings) -> tuple[str | None, ...]:
    """Return the device of each worker this server starts; None trains on the CPU."""
    if training.workers == 0:
        return ()
    return training.devices or (None,) * training.workers


class Supervisor:
    """Keeps `settings.training.workers` workers alive, and the job metrics true. Lives on the server's event loop."""

    def __init__(
        self,
        settings: Settings,
        *,
        jobs: JobStore,
        folders: JobFolders,
        metrics: Metrics,
        clock: Clock,
        command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._folders = folders
        self._metrics = metrics
        self._clock = clock
        self._command = tuple(command)
        self._stopping = asyncio.Event()
        self._rounds: list[asyncio.Task[None]] = []
        self._keepers: list[asyncio.Task[None]] = []
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._leases_lost: int | None = None

    @property
    def process_ids(self) -> list[int]:
        """Process ids of the workers alive."""
        return [process.pid for process in self._processes.values()]

    async def start(self) -> None:
        """Start the workers and the looking after jobs."""
        await self._look()
        for task, seconds, work in (("jobs", _LOOK_SECONDS, self._look), ("job_folders", _SWEEP_SECONDS, self._sweep)):
            rounds = keep_doing(task, seconds, work, self._metrics, clock=self._clock)
            self._rounds.append(asyncio.create_task(rounds))
        for number, device in enumerate(worker_devices(self._settings.training)):
            # Found out now: a device that is not there would fail again and again in the background.
            environment = worker_environment(device, {**_WAITING, **os.environ})
            keeper = self._keep_alive(device or "cpu", environment)
            self._keepers.append(asyncio.create_task(keeper, name=f"worker-{number}"))

    async def stop(self, grace: float) -> None:
        """Let every worker write a checkpoint and put its job back; kill those alive after `grace` seconds."""
        self._stopping.set()
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        if self._keepers:
            await asyncio.wait(self._keepers, timeout=grace)
        for process in self._processes.values():
            _LOG.warning("worker.killed", pid=process.pid, grace_seconds=grace)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for task in self._rounds:
            task.cancel()
        await asyncio.gather(*self._rounds, return_exceptions=True)

    async def _keep_alive(self, device: str, environment: dict[str, str]) -> None:
        pause = _FIRST_PAUSE
        while not self._stopping.is_set():
            begun = self._clock.monotonic()
            # A process that cannot be made, for want of memory perhaps, is no reason to stop trying.
            await try_once("worker", partial(self._run_worker, device, environment), self._metrics)
            if self._clock.monotonic() - begun >= _HEALTHY_SECONDS:
                pause = _FIRST_PAUSE
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stopping.wait()
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _run_worker(self, device: str, environment: dict[str, str]) -> None:
        """Start one worker and return when it has ended and its job is back in the queue."""
        owner = f"{socket.gethostname()[:24]}-{os.getpid()}-{secrets.token_hex(6)}"
        process = await asyncio.create_subprocess_exec(
            *self._command, "--owner", owner, "--device", device, stdin=asyncio.subprocess.PIPE, env=environment
        )
        self._processes[owner] = process
        self._metrics.workers.set(len(self._processes))
        _LOG.info("worker.started", pid=process.pid, owner=owner, device=device)
        try:
            if self._stopping.is_set():
                process.terminate()
            await self._send_settings(process)
            status = await process.wait()
            log = _LOG.info if status == 0 else _LOG.error
            log("worker.ended", pid=process.pid, owner=owner, status=status)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            del self._processes[owner]
            self._metrics.workers.set(len(self._processes))
        cause = f"its process ended with status {process.returncode}"
        await asyncio.to_thread(self._jobs.expire_leases, owner, cause)

    async def _send_settings(self, process: asyncio.subprocess.Process) -> None:
        stdin = process.stdin
        if stdin is None:
            return
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            stdin.write(self._settings.model_dump_json().encode() + b"\n")
            await stdin.drain()

    async def _look(self) -> None:
        """Put back the jobs of workers that went silent, wherever they ran, and count."""
        expired = await asyncio.to_thread(self._jobs.expire_leases)
        for job in expired:
            _LOG.warning("job.lease_expired", job=job.job_id, attempt=job.attempt, state=job.state)
        numbers = await asyncio.to_thread(self._jobs.numbers)
        for state, count in numbers.states.items():
            self._metrics.jobs.labels(state.value).set(count)
        self._metrics.job_steps_left.set(numbers.steps_left)
        if self._leases_lost is not None and numbers.leases_lost > self._leases_lost:
            self._metrics.job_leases_lost.inc(numbers.leases_lost - self._leases_lost)
        self._leases_lost = numbers.leases_lost

    async def _sweep(self) -> None:
        kept = await asyncio.to_thread(self._jobs.kept_jobs)
        swept = await asyncio.to_thread(self._folders.sweep, kept, _SWEEP_AGE)
        if swept:
            _LOG.info("job_folders.swept", count=swept)
