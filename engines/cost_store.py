"""Measured costs on disk, one file for each GPU, base model, set of versions and way of running."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from hueshift.engines.cache_files import exclusive, write_atomically
from hueshift.engines.cost_model import CostTable
from hueshift.engines.interface import Plan

_FORMAT = "hueshift.costs/1"
_log = structlog.get_logger()


@dataclass(frozen=True)
class Calibration:
    """What a calibration run found: the table, and for each plan whether the Triton kernels were faster there."""

    table: CostTable
    kernels: Mapping[Plan, bool] = field(default_factory=dict)


def read_costs(cache_dir: Path, identity: Mapping[str, str]) -> Calibration | None:
    """Return what was measured for exactly this identity, None if nothing usable is there."""
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
        table = CostTable(steps, float(stored["merge_ms"]), float(stored["overhead_ms"]))
        return Calibration(table, kernels)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("costs_unreadable", file=file.name, error=str(error))
        return None


def write_costs(cache_dir: Path, identity: Mapping[str, str], calibration: Calibration) -> None:
    """Keep what was measured, in the place of what was there."""
    table = calibration.table
    stored = {
        "format": _FORMAT,
        "identity": dict(identity),
        "steps": [[plan.value, rows, *size, round(ms, 4)] for (plan, rows, size), ms in sorted(table.step_ms.items())],
        # JSON has no infinity: it reads back as one.
        "merge_ms": str(table.merge_ms),
        "overhead_ms": table.overhead_ms,
        "kernels": {plan.value: used for plan, used in calibration.kernels.items()},
    }
    file = costs_file(cache_dir, identity)

    def write(path: Path) -> None:
        path.write_text(json.dumps(stored, indent=1), encoding="utf-8")

    with exclusive(file):
        write_atomically(file, write)


def costs_file(cache_dir: Path, identity: Mapping[str, str]) -> Path:
    """Where the costs of an identity lie."""
    digest = hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()
    return cache_dir / "costs" / f"{digest[:32]}.json"
