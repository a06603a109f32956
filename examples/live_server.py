"""A server of an example's own: `hueshift serve` in a process, on free loopback ports, with a store that vanishes."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

# The first start exports the model's graphs: 40 s on two idle cores, much longer on busy ones.
START_SECONDS = 900.0
STOP_SECONDS = 90.0


class ServerFailed(Exception):
    """The server did not start, or did not stop as it should."""


@dataclass
class LiveServer:
    """A running server. `exit_code` is there once it has stopped."""

    grpc: str
    metrics: str
    keys: Mapping[str, str]
    exit_code: int | None = field(default=None)


@contextlib.asynccontextmanager
async def live_server(
    tenants: tuple[str, ...], cache: Path, log: Path, settings: Mapping[str, str] | None = None
) -> AsyncIterator[LiveServer]:
    """Run a server while the block runs, with one API key per tenant; stop it with SIGTERM, and wait until it drained.

    `cache` keeps exported graphs for the next start; `log` gets what the server says; `settings` are more environment
    variables. SIGTERM cancels the calling task, so that the server is stopped then too. Raises ServerFailed.
    """
    with tempfile.TemporaryDirectory(prefix="hueshift-") as store:
        environment = {
            **os.environ,
            "HUESHIFT_STORE__PATH": store,
            "HUESHIFT_STORE__CACHE_PATH": str(Path.cwd() / cache),
            **(settings or {}),
        }
        keys = {tenant: await _create_key(tenant, environment) for tenant in tenants}
        with log.open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                *_HUESHIFT,
                *("serve", "--port", "0", "--metrics-port", "0", "--json"),
                env=environment,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                # Of a session of its own, so that Ctrl-C reaches the example alone, which then stops the server.
                start_new_session=True,
            )
            try:
                _cancel_on_sigterm()
                server = await _addresses(process, keys, log)
                yield server
                server.exit_code = await _stop(process)
                if server.exit_code != 0:
                    raise ServerFailed(f"the server ended with {server.exit_code} instead of 0; see {log}")
            finally:
                await _stop(process)


_HUESHIFT = (sys.executable, "-P", "-m", "hueshift.server.cli.main")


def _cancel_on_sigterm() -> None:
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


async def _create_key(tenant: str, environment: Mapping[str, str]) -> str:
    process = await asyncio.create_subprocess_exec(
        *_HUESHIFT, "keys", "create", tenant, "--json", env=environment, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    if process.returncode != 0:
        raise ServerFailed(f"no key could be made for {tenant}")
    secret: str = json.loads(out)["secret"]
    return secret


async def _addresses(process: asyncio.subprocess.Process, keys: Mapping[str, str], log: Path) -> LiveServer:
    if process.stdout is None:
        raise ServerFailed("the server's output is not connected")
    try:
        line = await asyncio.wait_for(process.stdout.readline(), START_SECONDS)
    except TimeoutError as error:
        raise ServerFailed(f"the server was not ready after {START_SECONDS:.0f} s; see {log}") from error
    if not line:
        raise ServerFailed(f"the server ended with {await process.wait()} before it was ready; see {log}")
    told = json.loads(line)
    return LiveServer(told["grpc"], told["metrics"], keys)


async def _stop(process: asyncio.subprocess.Process) -> int:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
    try:
        return await asyncio.wait_for(process.wait(), STOP_SECONDS)
    except TimeoutError:
        process.kill()
        return await process.wait()
