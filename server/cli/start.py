"""Options of `hueshift generate` that start from a picture: img2img and edits by inversion."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hueshift.client.generation import StartPicture

_HINT = "--picture"

PictureFile = Annotated[
    Path | None,
    typer.Option(_HINT, exists=True, dir_okay=False, readable=True, help="Start from this picture instead of noise."),
]
Strength = Annotated[
    float | None,
    typer.Option(help="How much of --picture may change, above 0 to 1. Default: the server's, or 1 with --invert."),
]
InvertFlag = Annotated[
    bool,
    typer.Option("--invert", help="Keep the noise of --picture by DDIM inversion: an edit by the prompt."),
]
InversionSteps = Annotated[int | None, typer.Option(help="Steps of --invert; default: the server's.")]
NoiseShare = Annotated[
    float, typer.Option(help="How far --invert turns the noise towards the seed's: 0 keeps it, 1 is without --invert.")
]
ErrorFlag = Annotated[
    bool, typer.Option("--report-inversion-error", help="Tell how close --invert and the way back come to --picture.")
]


def start_picture(
    picture: Path | None,
    strength: float | None,
    invert: bool,
    steps: int | None,
    noise_share: float,
    report_error: bool,
) -> "StartPicture | None":
    """Return the client's option of these. Raises typer.BadParameter on one that needs another."""
    from hueshift.client.generation import Inversion, StartPicture

    inverts = invert or steps is not None or noise_share != 0 or report_error
    if picture is None:
        if inverts or strength is not None:
            raise typer.BadParameter("there is no picture to start from; give its file", param_hint=_HINT)
        return None
    inversion = Inversion(steps or 0, noise_share, report_error) if inverts else None
    return StartPicture(picture.read_bytes(), strength, inversion)
