"""Measured costs on disk, one file for each GPU, base model, set of versions and way of running."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from hueshift.engines.cache_files import exclusive, write_atomically
from hueshift.engines.cost_model import CostTable
from hueshift.engines.interface import Plan

_FORMAT = "hueshift.costs/2"
# Measurements of one base on one GPU that are no longer today's but stay: of a version that may be gone back to, and of
# servers with other settings that share the folder.
_KEPT_FORMER = 4
_log = structlog.get_logger()


@dataclass(frozen=True)
class Calibration:
    """What a start found: the table, for each plan whether the Triton kernels were faster there, and the UNet rows of
    one call that fit, by latent size.
    """

    table: CostTable
    kernels: Mapping[Plan, bool] = field(default_factory=dict)
    capacity: Mapping[tuple[int, int], int] = field(default_factory=dict)


def read_costs(cache_dir: Path, identity: Mapping[str, str]) -> Calibration | None:
    """Return what was measured for exactly this identity, None if nothing usable is there. A file that is read counts
    as new again when former ones are removed.
    """
    file = costs_file(cache_dir, identity)
    if not file.is_file():
        return None
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored["format"] != _FORMAT or stored["identity"] != dict(identity):
            return None
        steps = {
            (Plan(plan), int(rows), (int(height), int(width))): float(ms)
            for plan, rows, height, width, ms in stored["steps"]
        }
        kernels = {Plan(plan): bool(used) for plan, used in stored["kernels"].items()}
        capacity = {(int(height), int(width)): int(rows) for height, width, rows in stored["capacity"]}
        table = CostTable(steps, float(stored["merge_ms"]), float(stored["overhead_ms"]))
        # A folder that cannot be written is one that nothing is removed from.
        with suppress(OSError):
            file.touch()
        return Calibration(table, kernels, capacity)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("costs_unreadable", file=file.name, error=str(error))
        return None


def write_costs(cache_dir: Path, identity: Mapping[str, str], calibration: Calibration) -> None:
    """Keep what was measured, in the place of what was there.

    Of other identities with the same `base` and `gpu` the files that were used last stay, and older ones are removed.
    """
    table = calibration.table
    stored = {
        "format": _FORMAT,
        "identity": dict(identity),
        "steps": [[plan.value, rows, *size, round(ms, 4)] for (plan, rows, size), ms in sorted(table.step_ms.items())],
        # JSON has no infinity: it reads back as one.
        "merge_ms": str(table.merge_ms),
        "overhead_ms": table.overhead_ms,
        "kernels": {plan.value: used for plan, used in calibration.kernels.items()},
        "capacity": [[*size, rows] for size, rows in sorted(calibration.capacity.items())],
    }
    file = costs_file(cache_dir, identity)

    def write(path: Path) -> None:
        path.write_text(json.dumps(stored, indent=1), encoding="utf-8")

    with exclusive(file):
        write_atomically(file, write)
    # Without the lock: another process may be doing the same, and wait for this file's.
    _remove_former(file, identity)


def _remove_former(file: Path, identity: Mapping[str, str]) -> None:
    former = [other for other in file.parent.glob("*.json") if other != file and _is_alike(other, identity)]
    try:
        former.sort(key=lambda other: other.stat().st_mtime_ns, reverse=True)
        for other in former[_KEPT_FORMER:]:
            with exclusive(other):
                other.unlink(missing_ok=True)
            other.with_name(other.name + ".lock").unlink(missing_ok=True)
    except OSError as error:
        # Another process was faster, or may do what this one may not: nothing that a start should end for.
        _log.warning("costs_not_removed", folder=str(file.parent), error=str(error))


def _is_alike(file: Path, identity: Mapping[str, str]) -> bool:
    """True if a file is of the same base and GPU. What cannot be read is nobody's, and stays."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))["identity"]
        return all(stored[part] == identity[part] for part in ("base", "gpu"))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def costs_file(cache_dir: Path, identity: Mapping[str, str]) -> Path:
    """Where the costs of an identity lie."""
    digest = hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()
    return cache_dir / "costs" / f"{digest[:32]}.json"
