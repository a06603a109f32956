"""What the demo leaves behind: grid.png, report.html and report.json, and a summary on the terminal."""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from hueshift.examples.grid import Panel, Row, draw_grid
from hueshift.examples.judging import Outcome, Verdict

_TEMPLATE = Path(__file__).resolve().parent / "report_template.html"


def write_report(out: Path, verdict: Verdict) -> None:
    """Write the three files to `out`."""
    grid = draw_grid([_panel(outcome) for outcome in verdict.outcomes])
    grid.save(out / "grid.png", optimize=True)
    (out / "report.json").write_text(json.dumps(verdict.to_json(), indent=2) + "\n", encoding="utf-8")
    (out / "report.html").write_text(_page(verdict), encoding="utf-8")


def print_summary(console: Console, out: Path, verdict: Verdict) -> None:
    """Tell people how it went."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold")
    for column in ("", "CLIP-I base", "CLIP-I personalised", "gain", "wanted", "training"):
        table.add_column(column, justify="left" if not column else "right")
    for o in verdict.outcomes:
        mark = "[green]" if o.passed else "[red]"
        table.add_row(
            o.lesson.key,
            f"{o.clip_i_base:.3f}",
            f"{o.clip_i_personalised:.3f}",
            f"{mark}{o.gain:+.3f}[/]",
            f"{o.lesson.target:+.1f}",
            f"{o.training_seconds:.0f} s",
        )
    console.print(table)
    unchanged = "[green]bit for bit the same[/]" if verdict.base_unchanged else "[red]changed[/]"
    console.print(
        f"Base model after training: {unchanged}.  Mixed batch: {verdict.images_per_second:.2f} pictures a second.  "
        f"Swap: {1000 * verdict.swap_seconds:.1f} ms.  All: {verdict.total_seconds:.0f} s."
    )
    for miss in verdict.misses():
        console.print(f"[bold red]Missed:[/bold red] {miss}")
    console.print(f"Look at {out / 'report.html'} and {out / 'grid.png'}.")


def _panel(outcome: Outcome) -> Panel:
    lesson = outcome.lesson
    training = [Image.open(path).convert("RGB") for path in lesson.pictures]
    # One true picture for all drawings is shown once.
    single = len({drawing.truth for drawing in lesson.drawings}) == 1
    truth: Sequence[Image.Image] = outcome.truth[:1] if single else outcome.truth
    return Panel(
        title=lesson.title[0].upper() + lesson.title[1:],
        note=f"CLIP-I {outcome.clip_i_base:.2f} to {outcome.clip_i_personalised:.2f}, "
        f"{outcome.training_seconds:.0f} s of training",
        rows=[
            Row("Pictures to\nlearn from", training),
            Row("Base model", outcome.base),
            Row("With the\nadapter", outcome.personalised),
            Row("Truth, never\nshown to it", truth),
        ],
    )


def _page(verdict: Verdict) -> str:
    template = _TEMPLATE.read_text(encoding="utf-8")
    values = {
        "verdict": "Every target was met" if verdict.passed else "Missed: " + "; ".join(verdict.misses()),
        "verdict_class": "good" if verdict.passed else "bad",
        "facts": _facts(verdict),
        "sections": "\n".join(_section(outcome) for outcome in verdict.outcomes),
        "versions": html.escape(", ".join(f"{k} {v}" for k, v in verdict.to_json()["versions"].items())),
    }
    for name, value in values.items():
        template = template.replace("{{" + name + "}}", value)
    return template


def _facts(verdict: Verdict) -> str:
    seconds = {o.lesson.key: o.training_seconds for o in verdict.outcomes}
    facts = {
        "Style learned in": f"{seconds['style']:.0f} s",
        "Fox learned in": f"{seconds['subject']:.0f} s",
        "Adapter swapped in": f"{1000 * verdict.swap_seconds:.1f} ms",
        "Mixed batch": f"{verdict.images_per_second:.2f} pictures/s",
        "Base after training": "same bits" if verdict.base_unchanged else "changed",
        "Everything": f"{verdict.total_seconds:.0f} s",
    }
    return "\n".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items())


def _section(outcome: Outcome) -> str:
    lesson = outcome.lesson
    shown = "".join(
        f"<figure>{_img(base)}{_img(own)}{_img(truth)}<figcaption>{html.escape(drawing.prompt)}</figcaption></figure>"
        for base, own, truth, drawing in zip(
            outcome.base, outcome.personalised, outcome.truth, lesson.drawings, strict=True
        )
    )
    training = "".join(_img(Image.open(path).convert("RGB")) for path in lesson.pictures)
    mark = "good" if outcome.passed else "bad"
    return f"""<section>
<h2>{html.escape(lesson.title[0].upper() + lesson.title[1:])}</h2>
<p>Tenant <b>{html.escape(lesson.tenant)}</b> learned it from these pictures in {outcome.job.steps} steps of
{html.escape(outcome.job.method.value)}.</p>
<div class="strip">{training}</div>
<p>CLIP-I with the true pictures: <b>{outcome.clip_i_base:.3f}</b> for the base model,
<b>{outcome.clip_i_personalised:.3f}</b> with the adapter
(<span class="{mark}">{outcome.gain:+.3f}, wanted {lesson.target:+.1f}</span>). CLIP-T: {outcome.clip_t:.3f}.</p>
<p class="legend"><span>base model</span><span>with the adapter</span><span>truth</span></p>
<div class="figures">{shown}</div>
</section>"""


def _img(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img width="128" height="128" alt="" src="data:image/png;base64,{data}">'
