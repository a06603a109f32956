"""Assemble a worker from the settings and run it. The torch import takes seconds, so only this process pays for it."""

import os
import socket

import structlog
import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.server.base_trainer import BaseTrainer
from hueshift.server.clock import SystemClock
from hueshift.server.failpoints import Failpoint
from hueshift.server.settings import Settings, TrainingSettings
from hueshift.server.stop import StopFlag
from hueshift.server.store.stores import open_stores
from hueshift.server.worker import Worker

_LOG = structlog.get_logger()


def run_worker(
    settings: Settings, *, stop: StopFlag, owner: str = "", device: str = "cpu", failpoint: Failpoint | None = None
) -> None:
    """Take jobs until `stop`. `owner` names the holder of leases; it must be unique among live workers.

    `device` is the setting's name of the device, which is the only one this process sees (`hueshift.server.devices`).
    Raises InvalidArgument (SETTINGS_INVALID) when it is not there.
    """
    seen = _open_device(settings.training, device)
    os.nice(settings.training.nice)
    torch.set_num_threads(settings.training.threads or os.cpu_count() or 1)
    # The log is JSON lines; bars of loading weights would break them.
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    clock = SystemClock()
    stores = open_stores(settings, clock)
    try:
        worker = Worker(
            owner=owner or f"{socket.gethostname()[:24]}-{os.getpid()}-{int(clock.time())}",
            jobs=stores.jobs,
            adapters=stores.adapters,
            folders=stores.folders,
            trainer=BaseTrainer.load(settings, seen),
            settings=settings.training,
            clock=clock,
            stop=stop,
            failpoint=failpoint or Failpoint(),
        )
        _LOG.info("worker.ready", device=device, threads=torch.get_num_threads(), model=settings.model.path.name)
        worker.run()
    finally:
        stores.close()


def _open_device(training: TrainingSettings, device: str) -> str:
    if device == "cpu":
        return "cpu"
    if torch.cuda.device_count() != 1:
        raise InvalidArgument.for_field(
            "training.devices",
            f"{device} given, and its worker sees {torch.cuda.device_count()} CUDA devices instead of that one; "
            "nvidia-smi lists those of the machine",
            Reason.SETTINGS_INVALID,
        )
    torch.cuda.set_per_process_memory_fraction(training.memory_fraction, 0)
    return "cuda"
