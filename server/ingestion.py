"""Turn an uploaded picture into a harmless one: checked by its header, decoded once, re-encoded without metadata.

Hostile files aim at the decoder, so servers call this through `ingestion_process`, in a child with limits of its own.
"""

import io
import re
from dataclasses import dataclass
from typing import Final

from PIL import Image, ImageCms, UnidentifiedImageError

from hueshift.adapters.errors import FieldViolation, InvalidArgument, Reason

FORMATS: Final = ("PNG", "JPEG", "WEBP")
# Format -> what its files hold, from which byte on.
_SIGNATURES: Final = {"PNG": (b"\x89PNG\r\n\x1a\n", 0), "JPEG": (b"\xff\xd8\xff", 0), "WEBP": (b"WEBP", 8)}
_ORIENTATION_TAG: Final = 0x0112
# EXIF orientation -> what undoes it (Exif 2.32, table 6, tag 274).
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class PictureLimits:
    """What a picture may be. `kept_side` bounds the shorter side of what is kept: models train at 128 to 768 pixels.

    With `grey` it is a mask: what is kept is its alpha channel if that hides anything, else its lightness.
    """

    max_bytes: int
    max_pixels: int
    min_side: int = 32
    max_aspect: float = 4.0
    kept_side: int = 1024
    grey: bool = False


def ingest_picture(data: bytes, limits: PictureLimits, field: str = "picture") -> bytes:
    """Return the picture as a plain RGB PNG: first frame, upright, on white, in sRGB, without any metadata; a mask as a
    grey one.

    Raises InvalidArgument for `field`, with PICTURE_TOO_LARGE (bytes, pixels) or PICTURE_INVALID.
    """
    if len(data) > limits.max_bytes:
        text = f"{len(data)} bytes given; allowed: {limits.max_bytes}. Send a smaller or more compressed picture."
        raise InvalidArgument.for_field(field, text, Reason.PICTURE_TOO_LARGE)
    try:
        return _convert(data, limits)
    except _Refused as refusal:
        raise InvalidArgument.for_field(field, refusal.text, refusal.reason) from refusal
    except Exception as error:
        # A damaged file makes decoders raise almost anything (OSError, SyntaxError, struct.error, zlib.error, ...), and
        # there is nothing here but decoding: whatever it was, this file is not a picture we can use.
        text = f"the file cannot be decoded ({type(error).__name__}: {str(error)[:120]}). Export the picture again."
        raise InvalidArgument.for_field(field, text, Reason.PICTURE_INVALID) from error


def merge_refusals(refusals: list[InvalidArgument]) -> InvalidArgument:
    """Make one error of several, in order; the reason is the first one's."""
    violations: list[FieldViolation] = [violation for refusal in refusals for violation in refusal.violations]
    return InvalidArgument(refusals[0].reason, "; ".join(r.message for r in refusals), violations=violations)


class _Refused(Exception):
    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason = reason
        self.text = text


def _convert(data: bytes, limits: PictureLimits) -> bytes:
    try:
        # Reads the header only. The format list keeps Pillow's forty other decoders away from the file.
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow tells its own limit beside the number, which is not ours.
        given = re.search(r"\d+", str(error))
        text = f"{given[0] if given else 'too many'} pixels given; allowed: {limits.max_pixels} pixels in all. Send a "
        raise _Refused(Reason.PICTURE_TOO_LARGE, f"{text}smaller picture.") from error
    except UnidentifiedImageError as error:
        known = next((name for name, (mark, at) in _SIGNATURES.items() if data.startswith(mark, at)), None)
        if known is not None:
            text = f"it begins as a {known} file, but its header is damaged or unfinished. Export the picture again."
        else:
            text = f"not a {', '.join(FORMATS)} file (it begins with {data[:8]!r}). Export it as one of these."
        raise _Refused(Reason.PICTURE_INVALID, text) from error
    with image:
        _check_size(image.size, limits)
        factor = min(1.0, limits.kept_side / min(image.size))
        kept = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        # JPEG can decode at 1/2, 1/4 or 1/8 of its size: 4 to 64 times less memory for a large photo.
        image.draft(None, kept)
        image.load()
        # Only now: for PNG it loads too, and a second load after one that failed gives black instead of the error.
        orientation = _read_orientation(image)
        profile = image.info.get("icc_profile")
        # Pillow clips 16-bit grey at 255 when it converts; the high byte is the picture.
        plain = image.point(lambda value: value / 256).convert("L") if image.mode.startswith("I") else image
        plain = plain.convert("RGBA") if plain.has_transparency_data else plain
        if limits.grey:
            plain = _to_grey(plain)
        elif plain.mode not in ("RGB", "RGBA", "CMYK"):
            plain = plain.convert("RGB")
        if kept != plain.size:
            plain = plain.resize(kept, Image.Resampling.LANCZOS)
        if not limits.grey:
            plain = _to_srgb(_on_white(plain), profile)
    if orientation in _UPRIGHT:
        plain = plain.transpose(_UPRIGHT[orientation])
    # Pillow would write the profile and texts it keeps here into the PNG.
    plain.info = {}
    target = io.BytesIO()
    plain.save(target, format="PNG")
    return target.getvalue()


def _check_size(size: tuple[int, int], limits: PictureLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        text = f"{width}x{height} pixels given; allowed: {limits.max_pixels} pixels in all. Send a smaller picture."
        raise _Refused(Reason.PICTURE_TOO_LARGE, text)
    if min(size) < limits.min_side:
        text = f"{width}x{height} pixels given; allowed: at least {limits.min_side} on each side. Send a larger one."
        raise _Refused(Reason.PICTURE_INVALID, text)
    if max(size) > limits.max_aspect * min(size):
        text = (
            f"{width}x{height} pixels given; allowed: a longer side of at most {limits.max_aspect:g} times the "
            "shorter. Crop it to the subject."
        )
        raise _Refused(Reason.PICTURE_INVALID, text)


def _read_orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:
        # Broken EXIF is common in edited photos, and raises almost anything; the pixels are still good.
        return 1


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image
    paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(paper, image).convert("RGB")


def _to_grey(image: Image.Image) -> Image.Image:
    if image.mode == "RGBA":
        alpha = image.getchannel("A")
        # Programs that always write an alpha channel leave it opaque; then the colours are the mask.
        if alpha.getextrema() != (255, 255):
            return alpha
    return image.convert("L")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile is not None:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError):
            # A profile for another mode, or a broken one: slightly wrong colours are better than no picture.
            return image.convert("RGB")
        if converted is not None:
            return converted
    return image.convert("RGB")
