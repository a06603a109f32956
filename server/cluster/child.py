"""The body of a Ray actor: one process of ours, started again when it ends.

The process is a child, not the actor itself, so that a crash of CUDA or of a library costs a restart of seconds and the
signals of a stop arrive as they do on a single machine. The child's standard input stays open: when the actor is killed
the kernel closes it, and the child drains or puts its job back. Nothing here is remembered: jobs and replicas are rows
in the database.
"""

import contextlib
import logging
import os
import secrets
import subprocess
import sys
import threading
import time
from typing import Any

from hueshift.server.cluster.placement import Pool

_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 30.0
# A process that lived this long was no start-up failure.
_HEALTHY_SECONDS = 60.0


class Child:
    """Keeps one process alive. `node` names the machine in the leases that a worker takes; `address` is the node's."""

    def __init__(self, name: str, pool: str, settings: str, gpus: float, node: str, address: str) -> None:
        self._name = name
        self._command, self._environment = _command(Pool(pool), gpus, address)
        self._settings = settings
        self._node = node
        self._pool = Pool(pool)
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self._thread = threading.Thread(target=self._keep_alive, name="child", daemon=True)
        self._thread.start()

    def status(self) -> dict[str, Any]:
        """Return what an operator wants to know, as plain data."""
        with self._lock:
            process = self._process
            pid = process.pid if process is not None and process.poll() is None else None
            return {"name": self._name, "node": self._node, "pid": pid, "starts": self._starts}

    def stop(self, grace: float) -> None:
        """Let the process drain or put its job back; kill it after `grace` seconds."""
        self._stopping.set()
        with self._lock:
            if self._process is not None:
                self._process.terminate()
        self._thread.join(grace)
        with self._lock:
            if self._process is not None:
                self._process.kill()
        self._thread.join()

    def _keep_alive(self) -> None:
        pause = _FIRST_PAUSE
        while not self._stopping.is_set():
            begun = time.monotonic()
            try:
                self._run()
            except OSError:
                # No process could be made, for want of memory perhaps; the next try may find some.
                logging.getLogger(__name__).exception("%s has no process", self._name)
            if time.monotonic() - begun >= _HEALTHY_SECONDS:
                pause = _FIRST_PAUSE
            self._stopping.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _run(self) -> None:
        owner = f"{self._name}-{self._node[:8]}-{secrets.token_hex(4)}"
        last = ("--owner", owner) if self._pool is Pool.FINETUNE else ()
        with self._lock:
            if self._stopping.is_set():
                return
            process = subprocess.Popen([*self._command, *last], stdin=subprocess.PIPE, env=self._environment)
            self._process = process
            self._starts += 1
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(self._settings.encode() + b"\n")
                process.stdin.flush()
        process.wait()
        with contextlib.suppress(BrokenPipeError):
            process.communicate()


def _command(pool: Pool, gpus: float, address: str) -> tuple[list[str], dict[str, str]]:
    """Return the command of the process and its environment. Ray has set CUDA_VISIBLE_DEVICES for the GPUs it gave."""
    python = [sys.executable, "-P", "-m"]
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    if not gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if pool is Pool.FINETUNE:
        worker = ["hueshift.server.cli.worker", "--supervised", "--device", "cuda:0" if gpus else "cpu"]
        return [*python, *worker], environment
    serve = ["hueshift.server.cli.main", "serve", "--supervised", "--json", "--node-address", address]
    return [*python, *serve], environment
