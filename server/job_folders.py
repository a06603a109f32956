"""Where a job keeps its files: pictures that its tenant sent, checkpoints, generated class pictures.

The pictures are personal data. They go as soon as the job ends, unless the operator keeps them; those of a job that may
be retried go when that time is over. A sweep removes them, and what a crash left behind. No name that a client sent
becomes a path: job ids are made by the server.
"""

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path

import structlog

from hueshift.adapters.errors import Unavailable
from hueshift.server.ingestion_process import PictureFile
from hueshift.server.job_mirror import JobMirror

Known = Callable[[Collection[str]], set[str]]
_STAGED_PREFIX = "incoming-"
_MASKS = "masks"


class JobFolders:
    """One folder per job under `root`, shared by the server and its workers.

    With a `mirror` the folder is this host's own, and what other hosts need of it goes to the mirror too.
    """

    def __init__(
        self, root: Path, *, keep_pictures: bool = False, mirror: JobMirror | None = None, known: Known = set
    ) -> None:
        """`known` returns those of some job ids that there is a job of; without it, all of them."""
        self._mirror = mirror
        self._known = known
        self._root = root.expanduser().resolve()
        self._keep_pictures = keep_pictures
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def stage(self) -> Path:
        """Make a folder for pictures on their way in."""
        folder = self._root / f"{_STAGED_PREFIX}{secrets.token_hex(12)}"
        (folder / "upload").mkdir(mode=0o700, parents=True)
        (folder / "pictures").mkdir(mode=0o700)
        return folder

    @staticmethod
    def staged_file(folder: Path, index: int) -> PictureFile:
        """Return where the upload of a picture and its sanitised form lie in a staged folder."""
        return PictureFile(folder / "upload" / f"{index:03d}.bin", folder / "pictures" / f"{index:03d}.png")

    @staticmethod
    def staged_mask(folder: Path, index: int) -> PictureFile:
        """Return the same for the mask of a picture."""
        masks = folder / _MASKS
        masks.mkdir(mode=0o700, exist_ok=True)
        return PictureFile(folder / "upload" / f"{index:03d}-mask.bin", masks / f"{index:03d}.png")

    @staticmethod
    def stored_bytes(folder: Path) -> int:
        """Return the bytes of the sanitised pictures and masks in a staged folder."""
        return sum(file.stat().st_size for part in ("pictures", _MASKS) for file in (folder / part).glob("*.png"))

    def adopt(self, staged: Path, job_id: str) -> None:
        """Make a staged folder the job's own, without the raw uploads. It survives a power cut after this."""
        shutil.rmtree(staged / "upload")
        (staged / "work").mkdir(mode=0o700)
        for part in ("pictures", _MASKS):
            if (staged / part).is_dir():
                _sync(staged / part)
        _sync(staged)
        staged.rename(self._root / job_id)
        _sync(self._root)
        if self._mirror is not None:
            self._mirror.send_inputs(job_id, self._root / job_id)

    def fetch(self, job_id: str) -> None:
        """Bring the pictures and the newest checkpoint to this host, if they come from another.

        Raises Unavailable (STORE_UNAVAILABLE).
        """
        if self._mirror is not None:
            self._mirror.fetch(job_id, self._root / job_id)

    def keep_checkpoint(self, job_id: str, token: int, file: Path) -> None:
        """Let other hosts resume from a checkpoint of the attempt with that fencing token.

        Raises Unavailable (STORE_UNAVAILABLE).
        """
        if self._mirror is not None:
            self._mirror.send_checkpoint(job_id, token, file)

    def discard(self, folder: Path) -> None:
        """Remove a staged folder, if it is there."""
        shutil.rmtree(folder, ignore_errors=True)

    def pictures(self, job_id: str) -> list[Path]:
        """Return the sanitised pictures in order."""
        return sorted((self._root / job_id / "pictures").glob("*.png"))

    def masks(self, job_id: str) -> dict[int, Path]:
        """Return the sanitised masks by the indices of their pictures."""
        return {int(path.stem): path for path in sorted((self._root / job_id / _MASKS).glob("*.png"))}

    def holds_inputs(self, job_id: str, pictures: int) -> bool:
        """True if all pictures of a job are still here, or where its worker will fetch them.

        Raises Unavailable (STORE_UNAVAILABLE).
        """
        if len(self.pictures(job_id)) == pictures:
            return True
        return self._mirror is not None and self._mirror.pictures(job_id) == pictures

    def work(self, job_id: str) -> Path:
        """Return the folder of checkpoints and generated class pictures."""
        folder = self._root / job_id / "work"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    def end(self, job_id: str) -> None:
        """Remove what an ended job no longer needs. Harmless when repeated, or when another process does the same."""
        folder = self._root / job_id
        for part in ("work", "upload") if self._keep_pictures else ("",):
            shutil.rmtree(folder / part, ignore_errors=True)
        self._forget(job_id, keep_pictures=self._keep_pictures)

    def remove(self, job_id: str) -> None:
        """Remove the folder of a job that was not queued after all."""
        shutil.rmtree(self._root / job_id, ignore_errors=True)
        self._forget(job_id, keep_pictures=False)

    def sweep(self, kept_jobs: Collection[str], min_age: float) -> int:
        """End every folder older than `min_age` seconds that belongs to no kept job. Returns how many there were.

        Where the operator keeps pictures of ended jobs, they go once the job itself has been removed.
        """
        swept = 0
        forgotten = self._forgotten(kept_jobs, min_age) if self._keep_pictures else set()
        for folder in self._root.iterdir():
            age = time.time() - _last_change(folder)
            if folder.name in kept_jobs or age < min_age:
                continue
            if folder.name.startswith(_STAGED_PREFIX):
                self.discard(folder)
            elif folder.name in forgotten:
                self.remove(folder.name)
            elif not self._keep_pictures or (folder / "work").exists():
                self.end(folder.name)
            else:
                continue
            swept += 1
        if self._mirror is not None:
            swept += self._mirror.sweep(kept_jobs, min_age, keep_pictures=self._keep_pictures)
            for job_id in forgotten:
                self._mirror.remove(job_id)
        return swept

    def _forgotten(self, kept_jobs: Collection[str], min_age: float) -> set[str]:
        """Return the names of folders, here and in the mirror, that no job has any more."""
        names = {
            folder.name
            for folder in self._root.iterdir()
            if not folder.name.startswith(_STAGED_PREFIX) and time.time() - _last_change(folder) >= min_age
        }
        if self._mirror is not None:
            names |= self._mirror.jobs(min_age)
        return names - set(kept_jobs) - self._known(names)

    def _forget(self, job_id: str, *, keep_pictures: bool) -> None:
        if self._mirror is None:
            return
        try:
            self._mirror.remove(job_id, keep_pictures=keep_pictures)
        except Unavailable:
            # The job has ended all the same; the next sweep removes what is left.
            structlog.get_logger().warning("job_folders.not_removed", job=job_id, exc_info=True)


def _last_change(folder: Path) -> float:
    """Return when a file of an upload was begun, or anything else was put into the folder; now, if it is gone."""
    changes = []
    for place in (folder, folder / "upload"):
        with contextlib.suppress(FileNotFoundError):
            changes.append(place.stat().st_mtime)
    return max(changes, default=time.time())


def _sync(folder: Path) -> None:
    # A rename or a new file survives a power cut only once its folder is synced.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
