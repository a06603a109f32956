"""Options of `hueshift generate` beyond a plain picture: LAG sampling, shared attention, regions."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hueshift.server.cli.parse import parse_use

if TYPE_CHECKING:
    from hueshift.client.generation import Region

_HINT = "--region"
_FORM = "box=X,Y,W,H;prompt=TEXT;adapter=NAME:WEIGHT;feather=PIXELS"

LagFlag = Annotated[bool, typer.Option("--lag", help="Confine low-rank adapters to where their subject is drawn.")]
LagWords = Annotated[
    list[str] | None,
    typer.Option(metavar="WORD", help="Word of the prompt for --lag; repeat for several. Default: the adapters' own."),
]
MasksFlag = Annotated[bool, typer.Option("--save-masks", help="Write the masks of --lag beside the pictures.")]
SharedFlag = Annotated[
    bool,
    typer.Option("--shared-attention", help="Give all pictures the style of the first one; takes --count 2 or more."),
]
Regions = Annotated[
    list[str] | None,
    typer.Option(
        metavar=_FORM, help="Part of the picture with adapters of its own (or mask=FILE); repeat for several."
    ),
]


def guide_options(
    lag: bool, words: Sequence[str] | None, save_masks: bool, shared_attention: bool, regions: Sequence[str] | None
) -> dict[str, Any]:
    """Return the client's options of these; words or masks imply LAG sampling."""
    from hueshift.client.generation import LagSampling

    return {
        "lag": LagSampling(tuple(words or ()), save_masks) if lag or words or save_masks else None,
        "shared_attention": shared_attention,
        "regions": [parse_region(text) for text in regions or ()],
    }


def parse_region(text: str) -> "Region":
    """Return the region of `key=value;key=value`.

    Keys: `box` (pixels) or `mask` (a picture file), `prompt`, `adapter` (may repeat, as --adapter), `feather`. A prompt
    cannot hold a semicolon. Raises typer.BadParameter.
    """
    from hueshift.client.generation import AdapterUse, Region

    given: dict[str, str] = {}
    adapters: list[AdapterUse] = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        key, sign, value = part.partition("=")
        if key == "adapter" and value:
            adapters.append(AdapterUse(*parse_use(value, _HINT)))
        elif not sign or key not in ("box", "mask", "prompt", "feather") or key in given:
            raise typer.BadParameter(f"{part!r} is unknown or given twice; write {_FORM}", param_hint=_HINT)
        else:
            given[key] = value
    if ("box" in given) == ("mask" in given):
        raise typer.BadParameter(f"{text!r} needs either a box or a mask; write {_FORM}", param_hint=_HINT)
    return Region(
        prompt=given.get("prompt", ""),
        adapters=adapters,
        box=_parse_box(given["box"]) if "box" in given else None,
        mask=_read_mask(given["mask"]) if "mask" in given else None,
        feather=_parse_feather(given.get("feather", "0")),
    )


def _parse_box(text: str) -> tuple[int, int, int, int]:
    try:
        x, y, width, height = (int(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a box; write box=X,Y,WIDTH,HEIGHT", param_hint=_HINT) from error
    return x, y, width, height


def _read_mask(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"the mask cannot be read: {error}", param_hint=_HINT) from error


def _parse_feather(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a number of pixels", param_hint=_HINT) from error
