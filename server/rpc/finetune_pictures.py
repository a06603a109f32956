"""Uploaded pictures and masks made harmless, and matched with each other."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from hueshift.adapters.errors import FieldViolation, InvalidArgument, Reason
from hueshift.server.ingestion import PictureLimits
from hueshift.server.ingestion_process import PictureFile, ingest_files
from hueshift.server.job_folders import JobFolders


async def ingest_pictures(staged: Path, count: int, masked: Sequence[int], limits: PictureLimits) -> None:
    """Sanitise the pictures of a staged folder, then the masks of those in `masked`.

    Raises InvalidArgument naming `pictures[i]` or `pictures[i].mask`: what cannot be decoded, and masks of another size
    than their pictures.
    """
    pictures = [JobFolders.staged_file(staged, index) for index in range(count)]
    await ingest_files(pictures, limits)
    if not masked:
        return
    masks = [JobFolders.staged_mask(staged, index) for index in masked]
    try:
        await ingest_files(masks, limits)
    except InvalidArgument as error:
        raise _of_masks(error, masked) from error
    for index, mask in zip(masked, masks, strict=True):
        shown, given = _size(pictures[index]), _size(mask)
        if shown != given:
            text = f"{given[0]}x{given[1]} pixels given; allowed: {shown[0]}x{shown[1]}, as its picture has upright"
            raise InvalidArgument.for_field(f"pictures[{index}].mask", text, Reason.PICTURE_INVALID)


def _of_masks(error: InvalidArgument, masked: Sequence[int]) -> InvalidArgument:
    """Name masks where `ingest_files` counted them as pictures."""
    fields = {f"pictures[{place}]": f"pictures[{index}].mask" for place, index in enumerate(masked)}
    named = [FieldViolation(fields.get(v.field, "pictures"), v.description) for v in error.violations]
    text = "; ".join(f"{violation.field}: {violation.description}" for violation in named)
    return InvalidArgument(error.reason, text, violations=named)


def _size(file: PictureFile) -> tuple[int, int]:
    # Our own PNG; only its header is read.
    with Image.open(file.target, formats=("PNG",)) as picture:
        return picture.size
