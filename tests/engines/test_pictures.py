"""Picture files: pixels survive, provenance is there and readable, prompts are not."""

import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from hueshift.engines.pictures import DIGITAL_SOURCE_TYPE, PROVENANCE_NAMESPACE, PictureFormat, encode_picture, software

_NAMESPACES = {
    "iptc": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "hueshift": PROVENANCE_NAMESPACE,
}


def packet_of(picture: Image.Image) -> ElementTree.Element:
    """The XMP packet, parsed."""
    raw = picture.info.get("xmp") or picture.info["XML:com.adobe.xmp"].encode()
    return ElementTree.fromstring(raw.decode().partition("?>")[2].rpartition("<?xpacket")[0])


@pytest.mark.parametrize("fmt", list(PictureFormat))
def test_pixels_and_provenance(fmt: PictureFormat) -> None:
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    pixels = np.ascontiguousarray(np.broadcast_to(ramp[None, :, None], (48, 64, 3)))
    data, media_type = encode_picture(pixels, fmt, {"seed": "7", "adapters": "ab<c>&d*0.5"})
    picture = Image.open(io.BytesIO(data))
    picture.load()
    assert (picture.format, picture.size) == (fmt.value.upper(), (64, 48))
    assert media_type == f"image/{fmt}"
    difference = np.abs(np.asarray(picture.convert("RGB")).astype(int) - pixels)
    assert difference.max() <= (0 if fmt is PictureFormat.PNG else 12)
    packet = packet_of(picture)
    assert packet.findtext(".//iptc:DigitalSourceType", namespaces=_NAMESPACES) == DIGITAL_SOURCE_TYPE
    assert packet.findtext(".//xmp:CreatorTool", namespaces=_NAMESPACES) == software()
    assert packet.findtext(".//hueshift:seed", namespaces=_NAMESPACES) == "7"
    assert packet.findtext(".//hueshift:adapters", namespaces=_NAMESPACES) == "ab<c>&d*0.5"


def test_software_names_the_version() -> None:
    assert software().startswith("Hueshift ")
    assert software().split()[1][0].isdigit()
