"""Masks that callers send as pictures: from strangers' files to plain grey PNGs, in the same guarded child as all."""

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hueshift.adapters.errors import FieldViolation, InvalidArgument
from hueshift.engines.region_masks import Area
from hueshift.server.ingestion import PictureLimits
from hueshift.server.ingestion_process import PictureFile, ingest_files
from hueshift.server.rpc.generation_guides import MAX_MASK_BYTES

# Masks end at an eighth of the picture's size, so more would be thrown away.
_LIMITS = PictureLimits(
    max_bytes=MAX_MASK_BYTES, max_pixels=16_000_000, min_side=1, max_aspect=16.0, kept_side=1024, grey=True
)
# Each is a process of its own, for 0.1 s or more.
_AT_ONCE = 2


class RegionPictures:
    """Sanitises masks, a few requests at a time. Belongs to one event loop."""

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def sanitise(self, areas: Sequence[Area]) -> list[Area]:
        """Return the areas of a request's regions, each file among them as a plain grey PNG.

        Raises InvalidArgument (PICTURE_INVALID, PICTURE_TOO_LARGE) naming every refused mask.
        """
        given = {index: area for index, area in enumerate(areas) if isinstance(area, bytes)}
        if not given:
            return list(areas)
        async with self._turns:
            with tempfile.TemporaryDirectory(prefix="hueshift-masks-") as folder:
                files = await asyncio.to_thread(_write, Path(folder), list(given.values()))
                try:
                    await ingest_files(files, _LIMITS)
                except InvalidArgument as refusal:
                    raise _renamed(refusal, list(given)) from refusal
                done = await asyncio.to_thread(_read, files)
        clean = dict(zip(given, done, strict=True))
        return [clean.get(index, area) for index, area in enumerate(areas)]


def _write(folder: Path, pictures: Sequence[bytes]) -> list[PictureFile]:
    files = [PictureFile(folder / f"{number}.given", folder / f"{number}.png") for number in range(len(pictures))]
    for file, data in zip(files, pictures, strict=True):
        file.source.write_bytes(data)
    return files


def _read(files: Sequence[PictureFile]) -> list[bytes]:
    return [file.target.read_bytes() for file in files]


def _renamed(refusal: InvalidArgument, regions: Sequence[int]) -> InvalidArgument:
    """The same refusal in this request's names: the child calls its files pictures[0], pictures[1], ..."""
    names = {f"pictures[{number}]": f"regions[{region}].mask" for number, region in enumerate(regions)}
    violations = [FieldViolation(names.get(v.field, "regions"), v.description) for v in refusal.violations]
    text = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
    return InvalidArgument(refusal.reason, text, violations=violations)
