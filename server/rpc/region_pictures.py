"""Pictures of a Generate request, masks and what it starts from: strangers' files to plain PNGs, in the same guarded
child as all.
"""

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hueshift.adapters.errors import FieldViolation, InvalidArgument
from hueshift.engines.region_masks import Area
from hueshift.server.ingestion import PictureLimits
from hueshift.server.ingestion_process import PictureFile, ingest_files
from hueshift.server.rpc.generation_guides import MAX_MASK_BYTES
from hueshift.server.rpc.generation_start import MAX_START_BYTES
from hueshift.server.tenant_turns import TenantTurns

# Masks end at an eighth of the picture's size, so more would be thrown away.
_LIMITS = PictureLimits(
    max_bytes=MAX_MASK_BYTES, max_pixels=16_000_000, min_side=1, max_aspect=16.0, kept_side=1024, grey=True
)
_START_LIMITS = PictureLimits(max_bytes=MAX_START_BYTES, max_pixels=40_000_000, min_side=8, max_aspect=8.0)
# Each is a process of its own, for 0.1 s or more.
_AT_ONCE = 2


class RegionPictures:
    """Sanitises masks and start pictures, a few requests at a time, tenants in turn. Belongs to one event loop."""

    def __init__(self) -> None:
        self._turns = TenantTurns(_AT_ONCE)

    async def sanitise(self, areas: Sequence[Area], tenant: str = "") -> list[Area]:
        """Return the areas of a request's regions, each file among them as a plain grey PNG.

        Raises InvalidArgument (PICTURE_INVALID, PICTURE_TOO_LARGE) naming every refused mask.
        """
        given = {index: area for index, area in enumerate(areas) if isinstance(area, bytes)}
        if not given:
            return list(areas)
        done = await self._clean(tenant, list(given.values()), _LIMITS, [f"regions[{index}].mask" for index in given])
        clean = dict(zip(given, done, strict=True))
        return [clean.get(index, area) for index, area in enumerate(areas)]

    async def sanitise_start(self, picture: bytes, width: int, height: int, tenant: str = "") -> bytes:
        """Return the picture a request of this size starts from, as a plain RGB PNG that is large enough to cover it.

        Raises as `sanitise`, for picture.data.
        """
        # The shorter side is at least as long as the longer one of the request, unless the file's is shorter.
        limits = replace(_START_LIMITS, kept_side=max(width, height))
        (clean,) = await self._clean(tenant, [picture], limits, ["picture.data"])
        return clean

    async def _clean(
        self, tenant: str, pictures: Sequence[bytes], limits: PictureLimits, fields: Sequence[str]
    ) -> list[bytes]:
        async with self._turns.taken(tenant):
            with tempfile.TemporaryDirectory(prefix="hueshift-pictures-") as folder:
                files = await asyncio.to_thread(_write, Path(folder), pictures)
                try:
                    await ingest_files(files, limits)
                except InvalidArgument as refusal:
                    raise _renamed(refusal, fields) from refusal
                return await asyncio.to_thread(_read, files)


def _write(folder: Path, pictures: Sequence[bytes]) -> list[PictureFile]:
    files = [PictureFile(folder / f"{number}.given", folder / f"{number}.png") for number in range(len(pictures))]
    for file, data in zip(files, pictures, strict=True):
        file.source.write_bytes(data)
    return files


def _read(files: Sequence[PictureFile]) -> list[bytes]:
    return [file.target.read_bytes() for file in files]


def _renamed(refusal: InvalidArgument, fields: Sequence[str]) -> InvalidArgument:
    """The same refusal in this request's names: the child calls its files pictures[0], pictures[1], ..."""
    names = {f"pictures[{number}]": field for number, field in enumerate(fields)}
    violations = [FieldViolation(names.get(v.field, fields[0]), v.description) for v in refusal.violations]
    text = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
    return InvalidArgument(refusal.reason, text, violations=violations)
