"""What a job needs on whichever host takes it, in the object store: its pictures and its newest checkpoint.

Checkpoints lie under the fencing token of the attempt that wrote them. A worker that lost its job may still write, but
never over a checkpoint of its successor, which reads the one of the largest token.
"""

from collections.abc import Collection
from pathlib import Path

from hueshift.server.store.objects import Objects

_PREFIX = "jobs"
INPUTS = ("pictures", "masks")


class JobMirror:
    """Copies of job folders in an object store."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def send_inputs(self, job_id: str, folder: Path) -> None:
        """Upload every picture and mask of a job's folder."""
        for part in INPUTS:
            for file in sorted((folder / part).glob("*.png")):
                self._objects.put(f"{_PREFIX}/{job_id}/{part}/{file.name}", file)

    def pictures(self, job_id: str) -> int:
        """Return how many pictures of a job are there. Raises Unavailable (STORE_UNAVAILABLE)."""
        return sum(1 for _ in self._objects.entries(f"{_PREFIX}/{job_id}/pictures"))

    def send_checkpoint(self, job_id: str, token: int, file: Path) -> None:
        """Upload a checkpoint of the attempt with that fencing token."""
        self._objects.put(f"{_PREFIX}/{job_id}/work/{token:012d}/{file.name}", file)

    def fetch(self, job_id: str, folder: Path) -> None:
        """Bring the pictures, the masks and the newest checkpoint, if any, into a job's folder on this host."""
        keys = sorted(entry.key for entry in self._objects.entries(f"{_PREFIX}/{job_id}"))
        newest = max((key.split("/")[-2] for key in keys if "/work/" in key), default="")
        for key in keys:
            *_, part, name = key.split("/")
            if part in (*INPUTS, newest):
                target = folder / (part if part in INPUTS else "work") / name
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                partial = target.with_name(f"{name}.partial")
                self._objects.get(key, partial)
                partial.replace(target)

    def remove(self, job_id: str, *, keep_pictures: bool = False) -> None:
        """Remove a job's objects; harmless when repeated."""
        part = "/work" if keep_pictures else ""
        for entry in list(self._objects.entries(f"{_PREFIX}/{job_id}{part}")):
            self._objects.delete(entry.key)

    def jobs(self, min_age: float) -> set[str]:
        """Return the ids of the jobs that have objects, and none younger than `min_age` seconds."""
        ages: dict[str, float] = {}
        for entry in self._objects.entries(_PREFIX):
            job_id = entry.key.split("/")[1]
            ages[job_id] = min(entry.age, ages.get(job_id, entry.age))
        return {job_id for job_id, age in ages.items() if age >= min_age}

    def sweep(self, kept_jobs: Collection[str], min_age: float, *, keep_pictures: bool) -> int:
        """Remove what is older than `min_age` seconds and belongs to no kept job. Returns the number of objects."""
        swept = 0
        for entry in list(self._objects.entries(_PREFIX)):
            _, job_id, part, *_ = entry.key.split("/")
            if job_id in kept_jobs or entry.age < min_age or (keep_pictures and part in INPUTS):
                continue
            self._objects.delete(entry.key)
            swept += 1
        return swept
