"""Run `ingest_picture` over uploaded files in one short-lived child with hard limits of memory, CPU time and wall time.

The child is a fresh isolated interpreter (about 0.1 s to start), not a fork: it holds no key, no socket and no database
of the server. Whatever a hostile file does to a decoder ends with that child.
"""

import asyncio
import json
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hueshift.adapters.errors import Internal, InvalidArgument, Reason
from hueshift.server.ingestion import PictureLimits, ingest_picture, merge_refusals

MIB = 1024 * 1024
# Address space of the interpreter with Pillow and its libraries; 40 MiB are touched.
_BASE_MEMORY = 512 * MIB
# A decoded, converted and composited picture is held at most five times at 4 bytes a pixel.
_BYTES_PER_PIXEL = 20
# The largest allowed WebP took 2.5 s (2-core x86 CPU, 2026-11-20); slower machines get four times that.
_CPU_SECONDS_PER_PICTURE = 10
_START_SECONDS = 20.0
_SECONDS_PER_PICTURE = 10.0
# Decoding waits for serving, not the other way round.
_NICE = 5
_INVALID = Reason.PICTURE_INVALID
CHILD_COMMAND = (sys.executable, "-P", "-I", "-m", "hueshift.server.ingestion_process")


@dataclass(frozen=True, slots=True)
class PictureFile:
    """An uploaded file, and where its sanitised PNG goes."""

    source: Path
    target: Path


async def ingest_files(
    files: Sequence[PictureFile], limits: PictureLimits, command: Sequence[str] = CHILD_COMMAND
) -> None:
    """Sanitise every file, `files[i]` being the request's `pictures[i]`, in one process started with `command`.

    Raises InvalidArgument naming every refused picture. Cancellation kills the child.
    """
    order = {
        "limits": asdict(limits),
        "files": [[str(file.source), str(file.target)] for file in files],
    }
    child = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={},
    )
    timed_out = False
    try:
        async with asyncio.timeout(_START_SECONDS + _SECONDS_PER_PICTURE * len(files)):
            output, errors = await child.communicate(json.dumps(order).encode())
    except TimeoutError:
        timed_out = True
        output, errors = b"", b""
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if timed_out:
        raise InvalidArgument.for_field("pictures", "decoding took too long. Send smaller pictures.", _INVALID)
    _read_report(output, errors, child.returncode or 0, len(files))


def _read_report(output: bytes, errors: bytes, status: int, count: int) -> None:
    """Raise what the child found. It writes one line before each picture, and one after each refusal."""
    refusals: list[InvalidArgument] = []
    begun, done = -1, False
    for line in output.decode(errors="replace").splitlines():
        report: dict[str, Any] = json.loads(line)
        begun = int(report.get("begin", begun))
        done = bool(report.get("done", done))
        if "reason" in report:
            refusals.append(
                InvalidArgument.for_field(str(report["field"]), str(report["text"]), Reason(report["reason"]))
            )
    if not done and status < 0 and 0 <= begun < count:
        # Killed by a signal: its CPU limit, the machine's memory, or a crash inside a decoder.
        refusals.append(
            InvalidArgument.for_field(
                f"pictures[{begun}]", "decoding it broke a limit of time or memory. Export it again, smaller.", _INVALID
            )
        )
    elif not done:
        raise Internal(
            Reason.INTERNAL,
            f"the picture process ended with status {status}: {errors[-2000:].decode(errors='replace')}",
        )
    if refusals:
        raise merge_refusals(refusals)


def limit_self(limits: PictureLimits) -> None:
    """Bound this process: priority, memory, open files, size of what it writes; no core file with a picture in it."""
    memory = _BASE_MEMORY + _BYTES_PER_PIXEL * limits.max_pixels
    os.nice(_NICE)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    # Noise does not compress: 3 bytes a kept pixel, and room for the PNG's own structure.
    largest = MIB + round(4 * limits.kept_side**2 * limits.max_aspect)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))


def _renew_cpu_limit() -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime) + 1 + _CPU_SECONDS_PER_PICTURE
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def _work(order: dict[str, Any]) -> Iterator[dict[str, Any]]:
    limits = PictureLimits(**order["limits"])
    limit_self(limits)
    for index, (source, target) in enumerate(order["files"]):
        _renew_cpu_limit()
        yield {"begin": index}
        try:
            _write(Path(target), ingest_picture(Path(source).read_bytes(), limits, f"pictures[{index}]"))
        except InvalidArgument as refusal:
            violation = refusal.violations[0]
            yield {"reason": refusal.reason.value, "field": violation.field, "text": violation.description}
    yield {"done": True}


def _write(target: Path, data: bytes) -> None:
    with target.open("xb") as file:
        file.write(data)
        file.flush()
        # The job is acknowledged after this; a power cut must not leave it without its pictures.
        os.fsync(file.fileno())


def main() -> None:
    """Entry of the child: an order on standard input, reports as JSON lines on standard output."""
    for report in _work(json.load(sys.stdin)):
        sys.stdout.write(json.dumps(report) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
