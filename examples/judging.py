"""How well the demo did: CLIP scores against true pictures that no adapter has seen, and the targets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from platform import machine, python_version
from typing import Any

from PIL import Image

from hueshift.client.jobs import FineTune
from hueshift.examples.lessons import Lesson
from hueshift.examples.personalise import Drawn, decode
from hueshift.models.embedded import EMBEDDED_CLIP

_PACKAGES = ("hueshift", "torch", "diffusers", "transformers", "onnxruntime", "grpcio", "numpy", "pillow")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One lesson's scores: `clip_i_*` against the truth, `clip_t` of the personalised pictures and their meaning."""

    lesson: Lesson
    job: FineTune
    base: Sequence[Image.Image]
    personalised: Sequence[Image.Image]
    truth: Sequence[Image.Image]
    clip_i_base: float
    clip_i_personalised: float
    clip_t: float
    first_use_seconds: float

    @property
    def gain(self) -> float:
        """How far CLIP-I rose above the base model's."""
        return self.clip_i_personalised - self.clip_i_base

    @property
    def passed(self) -> bool:
        """Whether it rose far enough."""
        return self.gain >= self.lesson.target

    @property
    def training_seconds(self) -> float:
        """From a worker's start on the job to its end."""
        if self.job.started is None or self.job.ended is None:
            return 0.0
        return (self.job.ended - self.job.started).total_seconds()


@dataclass(frozen=True, slots=True)
class Verdict:
    """All that the demo found out. Times are in seconds."""

    outcomes: Sequence[Outcome]
    base_unchanged: bool
    generate_seconds: float
    swap_seconds: float
    images: int
    total_seconds: float
    engine: str
    plans: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every target was met."""
        return self.base_unchanged and all(outcome.passed for outcome in self.outcomes)

    @property
    def images_per_second(self) -> float:
        """Rate of the mixed batch, the first use of both adapters included."""
        return self.images / self.generate_seconds

    def misses(self) -> list[str]:
        """Say which targets were missed."""
        missed = [
            f"{o.lesson.key}: CLIP-I rose by {o.gain:+.3f} over the base model, wanted at least {o.lesson.target:+.1f}"
            for o in self.outcomes
            if not o.passed
        ]
        if not self.base_unchanged:
            missed.append("the base model's pictures after training differ from those before")
        return missed

    def to_json(self) -> dict[str, Any]:
        """Return the content of report.json."""
        scores = {
            o.lesson.key: {
                "clip_i_base": o.clip_i_base,
                "clip_i_personalised": o.clip_i_personalised,
                "clip_t": o.clip_t,
                "first_use_seconds": o.first_use_seconds,
                "target": o.lesson.target,
                "passed": o.passed,
            }
            for o in self.outcomes
        }
        training = {f"finetune_{o.lesson.key}": o.training_seconds for o in self.outcomes}
        return {
            **scores,
            "seconds": {**training, "generate": self.generate_seconds, "total": self.total_seconds},
            "swap_seconds": self.swap_seconds,
            "images_per_second": self.images_per_second,
            "base_unchanged": self.base_unchanged,
            "passed": self.passed,
            "engine": self.engine,
            "plans": list(self.plans),
            "versions": versions(),
        }


def judge(lessons: Sequence[Lesson], jobs: Mapping[str, FineTune], drawn: Drawn) -> list[Outcome]:
    """Score each lesson's pictures."""
    # Imported here: it brings torch, which the calls before do not need.
    from transformers.utils.logging import disable_progress_bar

    from hueshift.training.scores import ClipScorer

    disable_progress_bar()
    scorer = ClipScorer(EMBEDDED_CLIP)
    outcomes = []
    for lesson in lessons:
        base = [decode(picture) for picture in drawn.base[lesson.key]]
        personalised = [decode(picture) for picture in drawn.personalised[lesson.key]]
        truth = [Image.open(drawing.truth).convert("RGB") for drawing in lesson.drawings]
        outcomes.append(
            Outcome(
                lesson=lesson,
                job=jobs[lesson.key],
                base=base,
                personalised=personalised,
                truth=truth,
                clip_i_base=_mean(scorer.clip_i_pairs(base, truth)),
                clip_i_personalised=_mean(scorer.clip_i_pairs(personalised, truth)),
                clip_t=scorer.clip_t(personalised, [drawing.meaning for drawing in lesson.drawings]),
                first_use_seconds=max(p.timings.adapter_load for p in drawn.personalised[lesson.key]),
            )
        )
    return outcomes


def versions() -> dict[str, str]:
    """Return what the figures were made with."""
    return {"python": python_version(), "machine": machine(), **{name: version(name) for name in _PACKAGES}}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
