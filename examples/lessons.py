"""What the demo teaches: a drawing style from eight pictures, and a fox from four."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hueshift.client.choices import Subject

_STYLE_DRAWINGS = 8
PICTURES = Path(__file__).resolve().parent / "pictures"


@dataclass(frozen=True, slots=True)
class Drawing:
    """One picture to draw and to judge: with the adapter, by the base model alone, and what it should look like.

    `meaning` is the prompt without the learned word, for judging by words.
    """

    prompt: str
    base_prompt: str
    meaning: str
    seed: int
    truth: Path


@dataclass(frozen=True, slots=True)
class Lesson:
    """One adapter to learn and how to judge it. `target` is how far CLIP-I must rise above the base model's."""

    key: str
    title: str
    tenant: str
    subject: Subject
    pictures: tuple[Path, ...]
    captions: tuple[str, ...]
    drawings: tuple[Drawing, ...]
    target: float
    identifier_init: tuple[str, ...] = ()
    settings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Known:
    name: str
    caption: str
    path: Path


def style_lesson() -> Lesson:
    """OpenMoji's way of drawing, judged on things that are not among the pictures to learn from."""
    train, held_out = _read("openmoji")
    drawings = tuple(
        Drawing(
            prompt=known.caption,
            base_prompt=f"an emoji of a {known.name}",
            meaning=f"an emoji of a {known.name}",
            seed=number,
            truth=known.path,
        )
        for number, known in enumerate(held_out[:_STYLE_DRAWINGS])
    )
    return Lesson(
        key="style",
        title="OpenMoji's style, from eight pictures",
        tenant="studio",
        subject=Subject.STYLE,
        pictures=tuple(known.path for known in train),
        captions=tuple(known.caption for known in train),
        drawings=drawings,
        target=0.1,
        # The styles the base model knows: their mean is a better beginning than a word it never met.
        identifier_init=("noto", "twemoji", "fluent"),
    )


def subject_lesson() -> Lesson:
    """A fox in four styles, judged in a fifth style."""
    train, (held_out,) = _read("fox")
    meaning = held_out.caption.replace("sks animal", held_out.name)
    drawings = tuple(Drawing(held_out.caption, meaning, meaning, seed, held_out.path) for seed in range(4))
    return Lesson(
        key="subject",
        title="a fox, from four pictures",
        tenant="forest",
        subject=Subject.SUBJECT,
        pictures=tuple(known.path for known in train),
        captions=tuple(known.caption for known in train),
        drawings=drawings,
        target=0.5,
    )


def _read(folder: str) -> tuple[list[_Known], list[_Known]]:
    entries = json.loads((PICTURES / folder / "captions.json").read_text(encoding="utf-8"))
    found = [_Known(entry["name"], entry["caption"], PICTURES / folder / entry["file"]) for entry in entries]
    train = [known for known in found if known.path.parent.name == "train"]
    return train, [known for known in found if known not in train]
