"""The plan files of TensorRT on disk: named by all that decides what they hold, checked before use, never half written.

A plan runs on one kind of GPU under one version of TensorRT only. Neither is guessed from the file: the manifest beside
it says what the plan was built of and for, and the digest of its bytes.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.cache_files import digest_file, exclusive, publish_folder, write_atomically

_PLAN = "engine.plan"
_MANIFEST = "manifest.json"
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class PlanRanges:
    """What one optimisation profile covers: UNet rows, latent sides, and the slots of the slabs (fixed)."""

    max_batch: int
    sides: tuple[int, int, int]
    """Smallest, usual and largest latent height and width."""
    slots: int


@dataclass(frozen=True, slots=True)
class PlanIdentity:
    """All that decides the content of a plan file."""

    role: str
    """`dense` and `factored` take adapters as inputs, `merged` takes them by refit."""
    base: str
    graph: str
    """SHA-256 of the graph and its weights."""
    library: str
    version: str
    gpu: str
    capability: str
    ranges: PlanRanges
    flags: tuple[str, ...]

    @property
    def key(self) -> str:
        """Name of the plan's folder."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.base[:12]}-{self.role}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@dataclass(frozen=True, slots=True)
class StoredPlan:
    """A plan on disk. `identity` and `weights` are those of its manifest."""

    key: str
    file: Path
    size: int
    built: datetime
    identity: dict[str, Any]
    weights: list[dict[str, Any]]
    digest: str


class PlanCache:
    """The plans under `<cache folder>/tensorrt`."""

    def __init__(self, cache_dir: Path) -> None:
        self.folder = cache_dir / "tensorrt"

    def lock(self, identity: PlanIdentity) -> Any:
        """Hold the plan's lock among processes: only one of them builds it."""
        return exclusive(self.folder / identity.key)

    def find(self, identity: PlanIdentity) -> StoredPlan | None:
        """Return the plan if it is there and whole; a damaged or foreign one is logged and counts as absent."""
        folder = self.folder / identity.key
        if not folder.exists():
            return None
        problem = "its manifest cannot be read"
        plan = _read(folder)
        if plan is not None:
            problem = "" if plan.identity == _plain(identity) else "it was built for something else"
            problem = problem or self.problem_of(plan)
        if plan is None or problem:
            _log.warning("plan_refused", plan=identity.key, problem=problem)
            return None
        return plan

    def problem_of(self, plan: StoredPlan) -> str:
        """Say what is wrong with the bytes of a plan, or nothing."""
        try:
            return "" if digest_file(plan.file) == plan.digest else "its digest does not fit"
        except OSError as error:
            return f"it cannot be read ({error.strerror})"

    def store(self, identity: PlanIdentity, data: bytes, weights: list[dict[str, object]]) -> StoredPlan:
        """Put a plan on disk, whole or not at all. Call it under `lock`."""
        manifest = {
            "identity": _plain(identity),
            "digest": hashlib.sha256(data).hexdigest(),
            "built": datetime.now(UTC).isoformat(timespec="seconds"),
            "weights": weights,
        }

        def fill(folder: Path) -> None:
            (folder / _PLAN).write_bytes(data)
            (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")

        folder = self.folder / identity.key
        publish_folder(folder, fill)
        plan = _read(folder)
        if plan is None:
            raise OSError(f"{folder} was written and cannot be read")
        return plan

    def plans(self) -> list[StoredPlan]:
        """Every plan with a readable manifest, by name."""
        folders = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        found = (_read(folder) for folder in folders if folder.is_dir() and not folder.name.startswith("."))
        return [plan for plan in found if plan is not None]

    def named(self, key: str) -> StoredPlan:
        """Return the one plan whose name begins with `key`. Raises InvalidArgument if none or several do."""
        fitting = [plan for plan in self.plans() if plan.key.startswith(key)]
        if len(fitting) != 1:
            names = ", ".join(plan.key for plan in fitting or self.plans()) or "(there are none)"
            raise InvalidArgument.for_field("plan", f"{key!r} fits {len(fitting)} plans; give one of: {names}")
        return fitting[0]

    def remove(self, key: str) -> None:
        """Delete a plan."""
        with exclusive(self.folder / key):
            shutil.rmtree(self.folder / key, ignore_errors=True)

    def read_timing(self, name: str) -> bytes:
        """Return the timing cache of that name, empty if there is none."""
        file = self._timing(name)
        return file.read_bytes() if file.is_file() else b""

    def write_timing(self, name: str, data: bytes) -> None:
        """Keep a timing cache. The last of several builds at once wins; TensorRT checks what it reads."""
        write_atomically(self._timing(name), lambda path: _write(path, data))

    def _timing(self, name: str) -> Path:
        safe = "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in name)
        return self.folder / f"{safe}.timing"


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _plain(identity: PlanIdentity) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(asdict(identity)))
    return plain


def _read(folder: Path) -> StoredPlan | None:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return StoredPlan(
            key=folder.name,
            file=folder / _PLAN,
            size=(folder / _PLAN).stat().st_size,
            built=datetime.fromisoformat(manifest["built"]),
            identity=dict(manifest["identity"]),
            weights=list(manifest["weights"]),
            digest=str(manifest["digest"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
