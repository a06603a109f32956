"""Pictures from strangers: what is refused, what is dropped, and what a hostile file can do (nothing)."""

import asyncio
import contextlib
import io
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from hueshift.adapters.errors import Internal, InvalidArgument, Reason
from hueshift.server.ingestion import PictureLimits, ingest_picture
from hueshift.server.ingestion_process import PictureFile, ingest_files

LIMITS = PictureLimits(max_bytes=4_000_000, max_pixels=4_000_000)
RED, WHITE = (220, 30, 20), (255, 255, 255)


def encode(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, form, **options)
    return target.getvalue()


def ingest(data: bytes, limits: PictureLimits = LIMITS) -> Image.Image:
    png = ingest_picture(data, limits, "pictures[3]")
    image = Image.open(io.BytesIO(png), formats=("PNG",))
    image.load()
    assert image.mode == "RGB"
    # Metadata of any kind shows up here.
    assert image.info == {}
    assert [kind for kind in chunks(png) if kind not in ("IHDR", "IDAT", "IEND")] == []
    return image


def chunks(png: bytes) -> list[str]:
    kinds, position = [], 8
    while position < len(png):
        (length,) = struct.unpack(">I", png[position : position + 4])
        kinds.append(png[position + 4 : position + 8].decode())
        position += 12 + length
    return kinds


def refusal(data: bytes, limits: PictureLimits = LIMITS) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        ingest_picture(data, limits, "pictures[3]")
    assert caught.value.violations[0].field == "pictures[3]"
    return caught.value


def png_header(width: int, height: int) -> bytes:
    """A valid PNG that declares a size and holds almost nothing."""
    out = b"\x89PNG\r\n\x1a\n"
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0" * 64)),
        (b"IEND", b""),
    )
    for kind, body in parts:
        out += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return out


def near(pixel: Any, wanted: tuple[int, int, int], tolerance: int = 6) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, wanted, strict=True))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_the_three_formats_pass(form: str) -> None:
    image = ingest(encode(Image.new("RGB", (90, 60), RED), form))
    assert image.size == (90, 60)
    assert near(image.getpixel((45, 30)), RED)


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "ICO", "PPM", "TGA"])
def test_other_formats_are_refused(form: str) -> None:
    error = refusal(encode(Image.new("RGB", (64, 64), RED), form))
    assert error.reason is Reason.PICTURE_INVALID
    assert "PNG, JPEG, WEBP" in error.message


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF....WEBPVP8 "])
def test_rubbish_is_refused(data: bytes) -> None:
    assert refusal(data).reason is Reason.PICTURE_INVALID


def test_a_pickle_or_script_behind_a_png_head_is_refused() -> None:
    assert refusal(b"\x89PNG\r\n\x1a\n" + b"\x80\x04cos\nsystem\n" * 40).reason is Reason.PICTURE_INVALID


def test_too_many_bytes_are_refused_with_both_numbers() -> None:
    error = refusal(b"x" * 101, PictureLimits(max_bytes=100, max_pixels=100))
    assert error.reason is Reason.PICTURE_TOO_LARGE
    assert "101 bytes" in error.message
    assert "allowed: 100" in error.message


@pytest.mark.parametrize("side", [2_001, 12_000, 50_000])
def test_bombs_are_refused_by_their_header(side: int) -> None:
    # 2,001: over our cap only. 12,000: Pillow warns. 50,000: Pillow refuses.
    error = refusal(png_header(side, side))
    assert error.reason is Reason.PICTURE_TOO_LARGE
    assert "allowed: 4000000 pixels" in error.message


@pytest.mark.parametrize(("size", "word"), [((31, 64), "at least 32"), ((33, 200), "at most 4 times")])
def test_shapes_that_cannot_be_trained_on_are_refused(size: tuple[int, int], word: str) -> None:
    error = refusal(encode(Image.new("RGB", size, RED)))
    assert error.reason is Reason.PICTURE_INVALID
    assert f"{size[0]}x{size[1]}" in error.message
    assert word in error.message


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files_are_refused(form: str, share: float) -> None:
    noise = Image.frombytes("RGB", (200, 200), random.Random(1).randbytes(120_000))
    data = encode(noise, form)
    assert refusal(data[: int(len(data) * share)]).reason is Reason.PICTURE_INVALID


def test_a_png_whose_pixels_are_damaged_is_refused_and_not_taken_for_black() -> None:
    good = encode(Image.frombytes("RGB", (64, 64), random.Random(1).randbytes(64 * 64 * 3)))
    for place in (len(good) // 2, len(good) - 100):
        damaged = bytearray(good)
        damaged[place] ^= 0x10
        assert "the file cannot be decoded" in refusal(bytes(damaged)).message


@pytest.mark.parametrize(("form", "length"), [("PNG", 8), ("PNG", 33), ("JPEG", 20)])
def test_a_file_without_its_header_is_told_what_it_looks_like(form: str, length: int) -> None:
    message = refusal(encode(Image.new("RGB", (64, 64)), form)[:length]).message
    assert f"begins as a {form} file" in message
    assert "Export the picture again" in message


def test_a_bomb_is_told_our_limit_alone() -> None:
    message = refusal(png_header(20_000, 20_000)).message
    assert "400000000 pixels given; allowed: 4000000 pixels in all" in message


def test_flipped_bytes_give_a_picture_or_a_refusal() -> None:
    chance = random.Random(7)
    noise = Image.frombytes("RGB", (64, 64), chance.randbytes(12_288))
    for form in ("PNG", "JPEG", "WEBP"):
        good = encode(noise, form)
        for _ in range(60):
            data = bytearray(good)
            for _ in range(chance.randint(1, 8)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            # Anything but these two outcomes is an exception that fails the test.
            with contextlib.suppress(InvalidArgument):
                assert ingest_picture(bytes(data), LIMITS).startswith(b"\x89PNG")


def test_exif_turns_the_picture_and_goes() -> None:
    picture = Image.new("RGB", (80, 40), WHITE)
    picture.paste(RED, (0, 0, 40, 40))
    # Where the red half of the stored picture belongs once it is upright.
    upright = {
        1: ((80, 40), (10, 20)),
        2: ((80, 40), (70, 20)),
        3: ((80, 40), (70, 20)),
        4: ((80, 40), (10, 20)),
        5: ((40, 80), (20, 10)),
        6: ((40, 80), (20, 10)),
        7: ((40, 80), (20, 70)),
        8: ((40, 80), (20, 70)),
    }
    for orientation, (size, red_at) in upright.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        exif[0x010E] = "taken at home"
        data = encode(picture, "JPEG", exif=exif, quality=95)
        assert b"taken at home" in data
        png = ingest_picture(data, LIMITS)
        assert b"taken at home" not in png
        image = ingest(data)
        assert image.size == size, orientation
        assert near(image.getpixel(red_at), RED, 20), orientation
        opposite = (size[0] - 1 - red_at[0], size[1] - 1 - red_at[1])
        assert near(image.getpixel(opposite), WHITE, 20), orientation


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_is_ignored() -> None:
    data = encode(Image.new("RGB", (64, 64), RED), "JPEG", exif=b"Exif\0\0II*\0" + b"\xff" * 40)
    assert near(ingest(data).getpixel((5, 5)), RED)


def test_text_and_trailing_bytes_go() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "secret place")
    data = encode(Image.new("RGB", (64, 64), RED), pnginfo=info) + b"PK\x03\x04 a zip behind it"
    png = ingest_picture(data, LIMITS)
    assert b"secret" not in png
    assert b"zip" not in png
    assert ingest(data).size == (64, 64)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_only_the_first_frame_of_an_animation_counts(form: str) -> None:
    later = [Image.new("RGB", (64, 64), WHITE)] * 2
    data = encode(Image.new("RGB", (64, 64), RED), form, save_all=True, append_images=later, lossless=True)
    assert near(ingest(data).getpixel((5, 5)), RED)


def test_alpha_lies_on_white() -> None:
    clear = Image.new("RGBA", (64, 64), (*RED, 255))
    clear.paste((0, 0, 0, 0), (0, 0, 32, 64))
    palette = clear.quantize(8)
    grey = Image.new("LA", (64, 64), (0, 0))
    for data in (encode(clear), encode(clear, "WEBP", lossless=True), encode(palette)):
        image = ingest(data)
        assert near(image.getpixel((5, 5)), WHITE)
        assert near(image.getpixel((60, 5)), RED, 20)
    assert near(ingest(encode(grey)).getpixel((5, 5)), WHITE)


def test_a_palette_with_a_transparent_entry_lies_on_white() -> None:
    image = Image.new("P", (64, 64), 0)
    image.putpalette([0, 0, 0, *RED])
    image.paste(1, (32, 0, 64, 64))
    result = ingest(encode(image, transparency=0))
    assert near(result.getpixel((5, 5)), WHITE)
    assert near(result.getpixel((60, 5)), RED)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_pictures_become_colour(mode: str) -> None:
    assert ingest(encode(Image.new(mode, (64, 64), 255))).getpixel((5, 5)) == WHITE


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    image = ingest(encode(Image.new("I;16", (64, 64), 0x8040)))
    assert near(image.getpixel((5, 5)), (0x80, 0x80, 0x80), 1)


def test_cmyk_jpegs_keep_their_colour() -> None:
    image = ingest(encode(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG", quality=95))
    red, green, blue = image.getpixel((5, 5))  # type: ignore[misc]
    assert red > 200
    assert green < 60
    assert blue < 60


def test_colour_profiles_are_applied_and_go() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # An sRGB profile changes nothing; one of another mode, or a broken one, is ignored.
    for given in (srgb, profile, b"broken"):
        image = ingest(encode(Image.new("RGB", (64, 64), RED), icc_profile=given))
        assert near(image.getpixel((5, 5)), RED, 2)


def test_large_pictures_are_kept_smaller() -> None:
    limits = PictureLimits(max_bytes=4_000_000, max_pixels=4_000_000, kept_side=100)
    for form in ("PNG", "JPEG"):
        image = ingest(encode(Image.new("RGB", (1500, 1000), RED), form), limits)
        assert image.size == (150, 100)
        assert near(image.getpixel((75, 50)), RED)


def test_real_photos_pass(shared_dir: Path) -> None:
    limits = PictureLimits(max_bytes=16 << 20, max_pixels=40_000_000, kept_side=256)
    photos = sorted((shared_dir / "data" / "photos").glob("*/*.jpg"))
    assert len(photos) >= 5
    for photo in photos[:8]:
        image = ingest(photo.read_bytes(), limits)
        assert min(image.size) <= 256
        # Not one flat colour.
        assert len(image.resize((32, 32)).getcolors(1024) or []) > 100


async def test_the_child_sanitises_files_in_order(tmp_path: Path) -> None:
    files = [PictureFile(tmp_path / f"{index}.bin", tmp_path / f"{index}.png") for index in range(3)]
    for index, file in enumerate(files):
        file.source.write_bytes(encode(Image.new("RGB", (40 + index, 40), RED), "WEBP"))
    await ingest_files(files, LIMITS)
    for index, file in enumerate(files):
        with Image.open(file.target) as image:
            assert image.size == (40 + index, 40)


async def test_the_child_names_every_refused_picture(tmp_path: Path) -> None:
    good = encode(Image.new("RGB", (64, 64), RED))
    contents = [good, b"rubbish", good, png_header(50_000, 50_000)]
    files = [PictureFile(tmp_path / f"{index}.bin", tmp_path / f"{index}.png") for index in range(4)]
    for file, data in zip(files, contents, strict=True):
        file.source.write_bytes(data)
    with pytest.raises(InvalidArgument) as caught:
        await ingest_files(files, LIMITS)
    assert [violation.field for violation in caught.value.violations] == ["pictures[1]", "pictures[3]"]
    assert caught.value.reason is Reason.PICTURE_INVALID
    assert "allowed: 4000000 pixels" in caught.value.message


def test_the_childs_memory_is_bounded() -> None:
    code = """
from hueshift.server.ingestion import PictureLimits
from hueshift.server.ingestion_process import limit_self
limit_self(PictureLimits(max_bytes=1, max_pixels=1_000_000))
try:
    bytearray(600 << 20)
except MemoryError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "refused\n"


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGXCPU", "SIGKILL"])
async def test_a_picture_that_kills_the_decoder_is_refused(tmp_path: Path, name: str) -> None:
    code = f"""
import os, signal, sys
sys.stdin.read()
print('{{"begin": 0}}')
print('{{"begin": 1}}', flush=True)
os.kill(os.getpid(), signal.{name})
"""
    files = [PictureFile(tmp_path / f"{index}.bin", tmp_path / f"{index}.png") for index in range(3)]
    with pytest.raises(InvalidArgument) as caught:
        await ingest_files(files, LIMITS, [sys.executable, "-c", code])
    assert [violation.field for violation in caught.value.violations] == ["pictures[1]"]


async def test_a_cancelled_caller_takes_the_child_along(tmp_path: Path) -> None:
    code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    note = tmp_path / "pid"
    task = asyncio.create_task(ingest_files([], LIMITS, [sys.executable, "-c", code, str(note)]))
    async with asyncio.timeout(20):
        while not note.exists() or not note.read_text():  # noqa: ASYNC110 (another process writes it)
            await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not psutil.pid_exists(int(note.read_text()))


async def test_a_missing_upload_is_our_fault(tmp_path: Path) -> None:
    with pytest.raises(Internal):
        await ingest_files([PictureFile(tmp_path / "absent", tmp_path / "out")], LIMITS)
