"""`hueshift generate`: pictures from a prompt."""

from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hueshift.client.choices import ImageFormat, Priority, Sampler
from hueshift.server.cli.files import free_path, picture_name, save
from hueshift.server.cli.guides import LagFlag, LagWords, MasksFlag, Regions, SharedFlag, guide_options
from hueshift.server.cli.output import Output, plain, rows_table
from hueshift.server.cli.parse import parse_size, parse_use
from hueshift.server.cli.session import Session, connected
from hueshift.server.cli.start import (
    ErrorFlag,
    InversionSteps,
    InvertFlag,
    NoiseShare,
    PictureFile,
    Strength,
    start_picture,
)

if TYPE_CHECKING:
    from hueshift.client.generation import Finished, GenerateEvent, Picture

_PREVIEW_STEPS = 2
_PREVIEW_COLUMNS = 48
Seeds = Annotated[
    list[int] | None,
    typer.Option(metavar="N", help="Seed of the first picture; repeat for one per picture. Default: random."),
]
USE = "NAME[@REVISION][:WEIGHT][:BLOCK=WEIGHT,...]"


@connected
def generate(
    session: Session,
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    adapter: Annotated[list[str] | None, typer.Option(metavar=USE, help="Adapter; repeat to mix several.")] = None,
    negative: Annotated[str, typer.Option(help="What the picture should not show.")] = "",
    count: Annotated[int, typer.Option("--count", "-n", help="How many pictures.")] = 1,
    seed: Seeds = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; default: the server's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is without. Default: the server's.")] = None,
    sampler: Annotated[Sampler | None, typer.Option(help="Sampler; default: the server's.")] = None,
    eta: Annotated[float, typer.Option(help="Share of fresh noise, for ddim.")] = 0.0,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Size in pixels; default: the model's own.")] = None,
    image_format: Annotated[ImageFormat, typer.Option("--format", help="File format.")] = ImageFormat.PNG,
    priority: Annotated[Priority, typer.Option(help="Place among your own requests.")] = Priority.NORMAL,
    timeout: Annotated[float | None, typer.Option(help="Seconds for the whole call.")] = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the pictures.")] = Path(),
    preview: Annotated[bool, typer.Option("--preview", help="Draw the picture in the terminal as it forms.")] = False,
    lag: LagFlag = False,
    lag_word: LagWords = None,
    save_masks: MasksFlag = False,
    shared_attention: SharedFlag = False,
    region: Regions = None,
    picture: PictureFile = None,
    strength: Strength = None,
    invert: InvertFlag = False,
    inversion_steps: InversionSteps = None,
    noise_share: NoiseShare = 0.0,
    report_inversion_error: ErrorFlag = False,
) -> None:
    """Draw pictures from a prompt, with any mix of adapters, and write them to a folder."""
    from hueshift.client.generation import AdapterUse, Picture

    width, height = parse_size(size)
    options: dict[str, Any] = {
        "adapters": [AdapterUse(*parse_use(text)) for text in adapter or ()],
        "negative_prompt": negative,
        "count": count,
        "seeds": seed or (),
        "steps": steps,
        "guidance_scale": guidance,
        "sampler": sampler,
        "eta": eta,
        "width": width,
        "height": height,
        "format": image_format,
        "priority": priority,
        "preview_interval": _PREVIEW_STEPS if preview else 0,
        "timeout": timeout,
        **guide_options(lag, lag_word, save_masks, shared_attention, region),
        "picture": start_picture(picture, strength, invert, inversion_steps, noise_share, report_inversion_error),
    }
    given = {name: value for name, value in options.items() if value is not None}
    view = _make_view(session.output, preview)
    saved: list[Saved] = []
    with closing(session.client.generate(prompt, **given)) as events, view:
        for event in events:
            view.show(event)
            if isinstance(event, Picture):
                saved.append(_save(out / picture_name(prompt, event.seed, event.media_type), event))
    _report(session.output, saved, view.finished)


def _make_view(output: Output, preview: bool) -> "GenerateView":
    if preview and not output.interactive:
        raise typer.BadParameter("there is no terminal to draw in", param_hint="--preview")
    return GenerateView(output, preview)


@dataclass
class GenerateView:
    """Draws the progress of one call: a bar of steps and, if asked, the picture as it forms."""

    output: Output
    preview: bool
    finished: "Finished | None" = None
    _bar: Progress = field(init=False)
    _live: Live = field(init=False)
    _picture: RenderableType = ""

    def __post_init__(self) -> None:
        """Make the bar."""
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
        )
        self._task = self._bar.add_task("connecting", total=None)
        self._live = Live(self._bar, console=self.output.stderr, transient=True)

    def __enter__(self) -> "GenerateView":
        """Begin to draw, if there is a terminal."""
        if self.output.interactive:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop drawing; the last picture stays when pictures were asked for."""
        self._live.stop()
        if self.preview and self._picture:
            self.output.stderr.print(self._picture)

    def show(self, event: "GenerateEvent") -> None:
        """Draw one event."""
        from hueshift.client.generation import Finished, Preview, Progress, Queued
        from hueshift.client.generation import Picture as FinishedPicture

        match event:
            case Queued():
                ahead = f"{event.position} ahead" if event.position else "starting"
                self._bar.update(self._task, description=f"queued, {ahead}")
            case Progress():
                self._bar.update(self._task, description="denoising", completed=event.step, total=event.of)
            case Preview() | FinishedPicture():
                self._draw(event.data)
            case Finished():
                self.finished = event

    def _draw(self, data: bytes) -> None:
        if self.preview:
            from hueshift.server.cli.blocks import picture_text

            self._picture = picture_text(data, _PREVIEW_COLUMNS)
            self._live.update(Group(self._picture, self._bar), refresh=True)


@dataclass(frozen=True, slots=True)
class Saved:
    """A picture that was written, and its mask's file if it has one."""

    picture: "Picture"
    path: Path
    mask_path: Path | None

    @property
    def record(self) -> dict[str, Any]:
        """The picture without its files, as data."""
        record: dict[str, Any] = {"path": str(self.path), **plain(self.picture)}
        del record["data"], record["mask"]
        return record | ({"mask_path": str(self.mask_path)} if self.mask_path is not None else {})


def _save(wanted: Path, picture: "Picture") -> Saved:
    path = save(free_path(wanted), picture.data)
    mask = save(free_path(path.with_name(f"{path.stem}-mask.png")), picture.mask) if picture.mask else None
    return Saved(picture, path, mask)


def _report(output: Output, saved: list[Saved], finished: "Finished | None") -> None:
    rows = [
        (
            str(one.path),
            str(one.picture.seed),
            ", ".join(f"{a.adapter.rsplit('/', 1)[-1]}@{a.revision}:{a.weight:g}" for a in one.picture.adapters) or "-",
            "+".join(one.picture.plans),
            f"{one.picture.timings.denoise:.2f} s",
        )
        for one in saved
    ]
    records = [one.record for one in saved]
    value = {"pictures": records, "finished": plain(finished)}
    output.result(value, rows_table(("picture", "seed", "adapters", "plan", "denoising"), rows))
    if finished is not None:
        if finished.truncated_tokens:
            output.note(f"The last {finished.truncated_tokens} tokens of the prompt were too many and had no effect.")
        if finished.inversion_error is not None:
            output.note(f"Inversion and the way back change the picture's latents by {finished.inversion_error:.1%}.")
        noun = "picture" if finished.images == 1 else "pictures"
        output.note(f"{finished.images} {noun} in {finished.seconds:.1f} s (request {finished.request_id})")
