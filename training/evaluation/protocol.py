"""DreamBooth's protocol on one case: every prompt drawn several times and compared with the real pictures.

Ruiz et al. 2023 draw 30 subjects x 25 prompts x 4 pictures. Here subjects, prompts and pictures are what
is asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from hueshift.training.evaluation.drawing import Draw, Drawing
from hueshift.training.evaluation.encoders import PictureEncoder
from hueshift.training.evaluation.measures import (
    Measures,
    diversity_of,
    mean_cosine,
    mutual_cosine,
    paired_cosine,
)
from hueshift.training.evaluation.prompts import check_places, fill
from hueshift.training.scores import ClipScorer


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """What a prompt should look like: a picture that nothing was learned from."""

    prompt: str
    picture: Image.Image


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Questions:
    """What is drawn of a case, and what it is compared with.

    `phrase` stands in the prompts' places with the adapter, `noun` in those of the base and of CLIP-T. Every prompt is
    drawn with the seeds 0 to `images` - 1, every truth's with `truth_images` of them, every prior prompt with
    `prior_images`; those have no place.
    """

    phrase: str
    noun: str
    prompts: tuple[str, ...]
    real: tuple[Image.Image, ...]
    truths: tuple[Truth, ...] = ()
    prior: tuple[str, ...] = ()
    images: int = 2
    truth_images: int = 1
    prior_images: int = 1

    def __post_init__(self) -> None:
        """Check the places of the prompts. Raises InvalidArgument."""
        check_places(self.prompts, "prompts")
        check_places([truth.prompt for truth in self.truths], "truths")

    def drawings(self, phrase: str) -> list[Drawing]:
        """The pictures of the prompts, in order, then those of the truths."""
        own = [Drawing(fill(prompt, phrase), seed) for prompt in self.prompts for seed in range(self.images)]
        return own + [
            Drawing(fill(truth.prompt, phrase), seed) for truth in self.truths for seed in range(self.truth_images)
        ]

    def prior_drawings(self) -> list[Drawing]:
        """The pictures of other things."""
        return [Drawing(prompt, seed) for prompt in self.prior for seed in range(self.prior_images)]


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """The measures, and one picture of every prompt: of the seed 0, prompts first, then truths, then prior."""

    measures: Measures
    shown: tuple[Image.Image, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Judges:
    """What measures: a CLIP, and DINO where its weights are there."""

    clip: ClipScorer
    dino: PictureEncoder | None = None


def evaluate(
    questions: Questions, judges: Judges, draw: Draw, draw_base: Draw | None, *, phrase: str | None = None
) -> Evaluation:
    """Draw the case with `draw` and measure it.

    `draw_base` draws as the base model does; None leaves the prior out, as for the base model itself. `phrase` takes
    the place of the questions' own.
    """
    wanted = questions.drawings(questions.phrase if phrase is None else phrase)
    prior = questions.prior_drawings()
    # Equal drawings, a truth's prompt that is among the others for example, are drawn once.
    each = list(dict.fromkeys(wanted + prior))
    pictures = dict(zip(each, draw(each), strict=True))
    count = len(questions.prompts) * questions.images
    own = [pictures[drawing] for drawing in wanted[:count]]
    truth_pictures = [pictures[drawing] for drawing in wanted[count:]]
    kept = None
    if prior and draw_base is not None:
        after = judges.clip.embed_pictures([pictures[drawing] for drawing in prior])
        kept = paired_cosine(after, judges.clip.embed_pictures(draw_base(prior)))
    measures = _measure(questions, judges, own, truth_pictures, kept)
    first = [*wanted[:count][:: questions.images], *wanted[count:][:: questions.truth_images]]
    shown = [*first, *prior[:: questions.prior_images]]
    return Evaluation(measures, tuple(pictures[drawing] for drawing in shown))


def evaluate_real(questions: Questions, judges: Judges) -> Measures:
    """The real pictures against each other (the paper's "real images"): more cannot be expected of an adapter."""
    real = list(questions.real)
    clip = judges.clip.embed_pictures(real)
    dino = None if judges.dino is None else mutual_cosine(judges.dino.embed_pictures(real))
    return Measures(clip_i=mutual_cosine(clip), dino=dino)


def _measure(
    questions: Questions,
    judges: Judges,
    own: Sequence[Image.Image],
    truth_pictures: Sequence[Image.Image],
    prior: float | None,
) -> Measures:
    images = questions.images
    texts = [fill(prompt, questions.noun) for prompt in questions.prompts for _ in range(images)]
    clip = judges.clip.embed_pictures(own)
    dino = None if judges.dino is None else judges.dino.embed_pictures(own)
    return Measures(
        clip_i=mean_cosine(clip, judges.clip.embed_pictures(questions.real)),
        dino=None if judges.dino is None or dino is None else _against(judges.dino, dino, questions.real),
        truth=_truth(questions, judges.clip, truth_pictures),
        clip_t=paired_cosine(clip, judges.clip.embed_texts(texts)),
        prior=prior,
        diversity=diversity_of(clip, texts),
        dino_diversity=None if dino is None else diversity_of(dino, texts),
    )


def _against(encoder: PictureEncoder, rows: Tensor, real: Sequence[Image.Image]) -> float:
    return mean_cosine(rows, encoder.embed_pictures(real))


def _truth(questions: Questions, clip: ClipScorer, drawn: Sequence[Image.Image]) -> float | None:
    if not drawn:
        return None
    true = clip.embed_pictures([truth.picture for truth in questions.truths])
    return paired_cosine(clip.embed_pictures(drawn), true.repeat_interleave(questions.truth_images, 0))


def remember(draw: Draw) -> Draw:
    """A `draw` that draws nothing twice: the base's pictures of prior prompts are the same for every adapter."""
    known: dict[Drawing, Image.Image] = {}

    def drawing(wanted: Sequence[Drawing]) -> list[Image.Image]:
        new = [one for one in dict.fromkeys(wanted) if one not in known]
        if new:
            known.update(zip(new, draw(new), strict=True))
        return [known[one] for one in wanted]

    return drawing
