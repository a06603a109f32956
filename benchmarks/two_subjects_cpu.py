"""A job on two subjects with more and less of Cut-Mix-Unmix, and without it: figures as JSON, and a grid to look at.

    python -P benchmarks/two_subjects_cpu.py --data ../shared/data --out out/two-subjects

A fox and a guitar, four pictures of each in four drawing styles, `svdiff` with its other defaults for two subjects.
Jobs have the same seed unless they say so, and their pictures the same noise. Trained adapters stay in the folder of
--out.

A subject by itself is held against its true picture in a fifth style, and against the other's. Of pictures of both,
each half is held against the middle halves (of which cut rows are made) of its subject's pictures and of the other's:
`apart` is own less other.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hueshift.engines.base_model import load_base_model
from hueshift.models.embedded import EMBEDDED_CLIP, EMBEDDED_MODEL
from hueshift.training.defaults import complete_spec
from hueshift.training.evaluation.drawing import Drawing, make_painter
from hueshift.training.evaluation.grids import GridRow, draw_grid
from hueshift.training.evaluation.plan import read_picture
from hueshift.training.evaluation.teaching import School
from hueshift.training.scores import ClipScorer
from hueshift.training.spec import Method, Subject, SubjectKind, TrainingSpec

STYLES = ("noto", "twemoji", "fluent flat", "fluent modern")
TRUE_STYLE = "fluent 3d"
SUBJECTS = {
    "fox": Subject(identifier="sks", class_noun="animal"),
    "guitar": Subject(identifier="idk", class_noun="instrument"),
}
SEEDS = range(4)
WAYS: dict[str, dict[str, Any]] = {
    "without": {"cut_mix_probability": 0.0},
    "few": {"cut_mix_probability": 0.15, "unmix_weight": 0.0},
    "without, another seed": {"cut_mix_probability": 0.0, "seed": 1},
    "default": {},
    "default, another seed": {"seed": 1},
    "many": {"cut_mix_probability": 0.6},
    "many, heavy": {"cut_mix_probability": 0.6, "unmix_weight": 20.0},
}


def make_spec(steps: int, **given: Any) -> TrainingSpec:
    """The job; `given` are settings over its defaults."""
    first, second = SUBJECTS.values()
    return complete_spec(
        method=Method.SVDIFF,
        subject_kind=SubjectKind.SUBJECT,
        captions=[f"a {style} emoji of {_named(subject)}" for subject in (first, second) for style in STYLES],
        identifier=first.identifier,
        class_noun=first.class_noun,
        more_subjects=(second,),
        picture_subjects=(0,) * len(STYLES) + (1,) * len(STYLES),
        steps=steps,
        **given,
    )


def prompts() -> list[str]:
    """What is drawn, each with every seed: each subject by itself, then both, with their sides and without."""
    first, second = (_named(subject) for subject in SUBJECTS.values())
    alone = [f"a {TRUE_STYLE} emoji of {name}" for name in (first, second)]
    return [*alone, f"{first} on the left and {second} on the right", f"{first} and {second}"]


def halves(picture: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Left and right."""
    width, height = picture.size
    return picture.crop((0, 0, width // 2, height)), picture.crop((width // 2, 0, width, height))


def middle(picture: Image.Image) -> Image.Image:
    """The middle half."""
    width, height = picture.size
    return picture.crop((width // 4, 0, width // 4 + width // 2, height))


def measure(
    clip: ClipScorer,
    drawn: Sequence[Sequence[Image.Image]],
    truths: Sequence[Image.Image],
    learned: Sequence[Sequence[Image.Image]],
) -> dict[str, float]:
    """Figures of the pictures of `prompts()`. `truths` and `learned` are of the subjects, in order."""
    own = [clip.clip_i(drawn[n], [truths[n]]) for n in (0, 1)]
    other = [clip.clip_i(drawn[n], [truths[1 - n]]) for n in (0, 1)]
    found = {"truth": sum(own) / 2, "truth of the other": sum(other) / 2}
    middles = [[middle(picture) for picture in pictures] for pictures in learned]
    for name, pictures in zip(("sides named", "no sides named"), drawn[2:], strict=True):
        parts = [halves(picture) for picture in pictures]
        scores = [
            [clip.clip_i([part[side] for part in parts], middles[subject]) for subject in (0, 1)] for side in (0, 1)
        ]
        found[f"{name}: own half"] = (scores[0][0] + scores[1][1]) / 2
        found[f"{name}: apart"] = found[f"{name}: own half"] - (scores[0][1] + scores[1][0]) / 2
    return {key: round(value, 3) for key, value in found.items()}


def main() -> int:
    """Train what is not there, draw, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with subjects/<name>/<style>.png")
    parser.add_argument("--out", type=Path, default=Path("out/two-subjects"))
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/hueshift").expanduser())
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    learned = [[_read(options.data, name, style) for style in STYLES] for name in SUBJECTS]
    truths = [_read(options.data, name, TRUE_STYLE) for name in SUBJECTS]
    painter, clip = make_painter(load_base_model(EMBEDDED_MODEL), options.cache), ClipScorer(EMBEDDED_CLIP)
    school = School(painter.base, painter.engine.factors, options.out / "adapters")
    drawings = [Drawing(prompt, seed) for prompt in prompts() for seed in SEEDS]
    rows = [GridRow("learned from", [picture for pictures in learned for picture in pictures])]
    for name, given in WAYS.items():
        taught = school.teach(make_spec(options.steps, **given), [p for pictures in learned for p in pictures])
        drawn = painter.draw(drawings, [(taught.adapter, 1.0)])
        groups = [drawn[begin : begin + len(SEEDS)] for begin in range(0, len(drawn), len(SEEDS))]
        figures = measure(clip, groups, truths, learned)
        print(
            json.dumps({"Cut-Mix-Unmix": name, "steps": options.steps, "step_seconds": taught.step_seconds, **figures})
        )
        rows += [
            GridRow(f"{name}: alone", [*groups[0], *groups[1]]),
            GridRow(f"{name}: both", [*groups[2], *groups[3]]),
        ]
    draw_grid(rows, ()).save(options.out / "two-subjects.png")
    return 0


def _named(subject: Subject) -> str:
    return f"a {subject.identifier} {subject.class_noun}"


def _read(data: Path, name: str, style: str) -> Image.Image:
    return read_picture(data / "subjects" / name / f"{style.replace(' ', '-')}.png")


if __name__ == "__main__":
    sys.exit(main())
