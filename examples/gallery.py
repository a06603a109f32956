"""Every kind of adapter and every way of sampling side by side: `make gallery` writes docs/gallery.md and its pictures.

    python -P examples/gallery.py [--only lag --only regions]

Needs nothing but the repository: the embedded model, and the pictures of the examples. Adapters are trained once, about
six minutes on two idle cores, and kept in --work by all that decides them; a second run only draws, two minutes.
"""

import argparse
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import structlog
from rich.console import Console

from hueshift.adapters.adapter import Adapter
from hueshift.engines.base_model import load_base_model
from hueshift.examples.bars import Bars, Stage
from hueshift.examples.gallery_lessons import LESSONS, PICTURES
from hueshift.examples.gallery_panels import show_blocks, show_interpolation, show_kinds, show_style, show_weights
from hueshift.examples.gallery_sampling import (
    show_inversion,
    show_lag,
    show_picture_start,
    show_regions,
    show_shared,
)
from hueshift.examples.gallery_studio import Panel, Studio
from hueshift.models.embedded import EMBEDDED_MODEL
from hueshift.training.evaluation.drawing import make_painter
from hueshift.training.evaluation.grids import draw_grid
from hueshift.training.evaluation.teaching import School

PANELS: Mapping[str, Callable[[Studio], Panel]] = {
    "kinds": show_kinds,
    "weights": show_weights,
    "style": show_style,
    "interpolation": show_interpolation,
    "blocks": show_blocks,
    "lag": show_lag,
    "regions": show_regions,
    "shared": show_shared,
    "picture": show_picture_start,
    "inversion": show_inversion,
}
INTRODUCTION = """# Gallery

Written by `make gallery` (`examples/gallery.py`) with the embedded model alone; do not edit. Pictures are as they came:
15 DPM-Solver++ steps, guidance 3, seeds from 0, nothing picked. The pictures learned from are in `examples/pictures`,
with their licences.
"""


def make_studio(work: Path, cache: Path, bars: Bars, steps: int | None = None) -> Studio:
    """Load the model and build the engine; `steps` stands in for the lessons' own."""
    with bars.stage("Load the model"):
        base = load_base_model(EMBEDDED_MODEL)
        painter = make_painter(base, cache)
    school = School(base, painter.engine.factors, work / "adapters")
    return Studio(painter, TaughtAdapters(school, bars, steps), PICTURES)


class TaughtAdapters(Mapping[str, Adapter]):
    """The lessons' adapters by key, each trained when it is first asked for, unless the school has it already."""

    def __init__(self, school: School, bars: Bars, steps: int | None) -> None:
        self._school, self._bars, self._steps = school, bars, steps
        self._lessons = {lesson.key: lesson for lesson in LESSONS}
        self._taught: dict[str, Adapter] = {}

    def __getitem__(self, key: str) -> Adapter:
        """Return the adapter of a lesson, after training it if need be."""
        if key not in self._taught:
            lesson = self._lessons[key]
            with self._bars.stage(f"Learn: {lesson.title}") as stage:
                taught = self._school.teach(lesson.spec(self._steps), lesson.pictures(), partial(_tell, stage))
            self._taught[key] = taught.adapter
        return self._taught[key]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys."""
        return iter(self._lessons)

    def __len__(self) -> int:
        """How many lessons there are."""
        return len(self._lessons)


def write_panel(page: Path, name: str, panel: Panel) -> None:
    """Write a panel's picture beside `page`, and its section of the page; other sections stay."""
    pictures = page.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    grid = draw_grid(panel.rows, panel.headings)
    # As many colours as nobody misses, for a fourth of the bytes.
    grid.quantize(256).save(pictures / f"{name}.png", optimize=True)
    sections = read_sections(page)
    sections[name] = f"## {panel.title}\n{panel.text}\n\n![{panel.title}]({pictures.name}/{name}.png)\n"
    known = [f"{_mark(name)}\n{sections[name]}" for name in PANELS if name in sections]
    page.write_text("\n".join([INTRODUCTION + _where(), *known]), encoding="utf-8")


def read_sections(page: Path) -> dict[str, str]:
    """Sections of a page by their panel's name; none of a page that is not there."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    starts = sorted((text.index(_mark(name)), name) for name in PANELS if _mark(name) in text)
    ends = [*(begin for begin, _ in starts[1:]), len(text)]
    return {
        name: text[begin + len(_mark(name)) : end].strip("\n") + "\n"
        for (begin, name), end in zip(starts, ends, strict=False)
    }


def main() -> None:
    """Draw the chosen panels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=Path("docs/gallery.md"), help="pictures go to a folder beside it")
    parser.add_argument("--work", type=Path, default=Path("out/gallery"), help="keeps the adapters")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/hueshift").expanduser())
    parser.add_argument("--only", choices=list(PANELS), action="append", help="draw this panel only; repeatable")
    parser.add_argument("--steps", type=int, help="training steps of every adapter, for a quick look")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with Bars(Console(stderr=True, highlight=False)) as bars:
        studio = make_studio(options.work, options.cache, bars, options.steps)
        for name in options.only or PANELS:
            with bars.stage(f"Draw: {name}"):
                write_panel(options.page, name, PANELS[name](studio))


def _tell(stage: Stage, step: int, of: int) -> None:
    stage.move(step, of, f"step {step} of {of}")


def _mark(name: str) -> str:
    return f"<!-- panel: {name} -->"


def _where() -> str:
    return f"\n{os.cpu_count()}-core {platform.machine()} CPU, {datetime.now(UTC).date().isoformat()}.\n"


if __name__ == "__main__":
    main()
