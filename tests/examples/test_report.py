"""What the demo leaves behind, made from pictures that are there already."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from hueshift.client.choices import JobState, Method
from hueshift.client.jobs import FineTune
from hueshift.examples.grid import Panel, Row, draw_grid
from hueshift.examples.judging import Outcome, Verdict
from hueshift.examples.lessons import Lesson, style_lesson, subject_lesson
from hueshift.examples.report import print_summary, write_report

BEGAN = datetime(2026, 11, 20, tzinfo=UTC)


def outcome(lesson: Lesson, gain: float) -> Outcome:
    pictures = [Image.open(drawing.truth).convert("RGB") for drawing in lesson.drawings]
    job = FineTune(
        name=f"tenants/{lesson.tenant}/fineTunes/job-1",
        state=JobState.SUCCEEDED,
        method=Method.SVDIFF,
        subject=lesson.subject,
        step=150,
        steps=150,
        loss=0.1,
        adapter=lesson.key,
        revision=1,
        attempt=1,
        error=None,
        created=BEGAN,
        started=BEGAN,
        ended=BEGAN + timedelta(seconds=80),
        sequence=9,
        scores=None,
    )
    return Outcome(lesson, job, pictures, pictures, pictures, 0.125, 0.125 + gain, 0.25, 0.5)


@pytest.fixture
def verdict() -> Verdict:
    outcomes = [outcome(style_lesson(), 0.2), outcome(subject_lesson(), 0.75)]
    return Verdict(outcomes, True, 12.0, 0.002, 24, 230.0, "onnxruntime", ("dense", "factored"))


@pytest.mark.parametrize("lesson", [style_lesson(), subject_lesson()], ids=lambda lesson: lesson.key)
def test_lessons_are_complete_and_never_judged_on_what_they_teach(lesson: Lesson) -> None:
    assert len(lesson.captions) == len(lesson.pictures) == {"style": 8, "subject": 4}[lesson.key]
    assert all("sks" in caption for caption in lesson.captions)
    for drawing in lesson.drawings:
        assert drawing.truth.is_file()
        assert drawing.truth not in lesson.pictures
        assert "sks" in drawing.prompt
        assert "sks" not in drawing.base_prompt + drawing.meaning


def test_the_report_has_the_promised_keys(verdict: Verdict, tmp_path: Path) -> None:
    write_report(tmp_path, verdict)
    report = json.loads((tmp_path / "report.json").read_text())
    for key in ("style", "subject"):
        assert {"clip_i_base", "clip_i_personalised", "clip_t"} <= report[key].keys()
    assert report["seconds"] == {
        "finetune_style": 80.0,
        "finetune_subject": 80.0,
        "generate": 12.0,
        "total": 230.0,
    }
    assert (report["images_per_second"], report["swap_seconds"], report["base_unchanged"]) == (2.0, 0.002, True)
    assert "torch" in report["versions"]


def test_the_page_stands_alone(verdict: Verdict, tmp_path: Path) -> None:
    write_report(tmp_path, verdict)
    page = (tmp_path / "report.html").read_text()
    assert "{{" not in page
    assert "Every target was met" in page
    # Per drawing base, personalised and truth; beside them the pictures to learn from.
    assert page.count("data:image/png;base64,") == 8 + 8 * 3 + 4 + 4 * 3
    assert "http" not in page  # nothing is fetched


def test_what_is_missed_is_said(verdict: Verdict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict.passed
    bad = replace(verdict, outcomes=[outcome(style_lesson(), 0.09), verdict.outcomes[1]], base_unchanged=False)
    assert not bad.passed
    assert len(bad.misses()) == 2
    print_summary(Console(stderr=True, width=200), tmp_path, bad)
    told = capsys.readouterr().err
    assert "style: CLIP-I rose by +0.090 over the base model, wanted at least +0.1" in told
    assert "after training differ" in told


def test_the_grid_puts_every_picture_in_its_cell() -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    panels = [
        Panel("One", "left", [Row("a", [red, blue]), Row("b", [blue, None])]),
        Panel("Two", "right", [Row("a", [red]), Row("b", [blue])]),
    ]
    grid = draw_grid(panels)
    counts = dict.fromkeys(((255, 0, 0), (0, 0, 255)), 0)
    for count, colour in grid.getcolors(maxcolors=1 << 20) or []:
        if colour in counts:
            counts[colour] = count
    assert counts == {(255, 0, 0): 2 * 128 * 128, (0, 0, 255): 3 * 128 * 128}
