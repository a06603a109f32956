"""What is drawn, with which seeds and phrases, and what is compared with what."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from hueshift.adapters.errors import InvalidArgument
from hueshift.training.evaluation.drawing import Drawing
from hueshift.training.evaluation.protocol import Judges, Questions, Truth, evaluate, evaluate_real, remember


def picture(seed: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small, "RGB").resize((64, 64))


class Easel:
    """Draws a picture of its own for each drawing, and remembers what it was asked for."""

    def __init__(self, salt: int = 0) -> None:
        self.salt = salt
        self.asked: list[Drawing] = []

    def __call__(self, drawings: Sequence[Drawing]) -> list[Image.Image]:
        self.asked += drawings
        return [self.picture(drawing) for drawing in drawings]

    def picture(self, drawing: Drawing) -> Image.Image:
        return picture(sum(drawing.prompt.encode()) + 1000 * drawing.seed + self.salt)


@pytest.fixture
def questions() -> Questions:
    return Questions(
        phrase="sks animal",
        noun="animal",
        prompts=("a noto emoji of a {}", "an emoji of a red {}"),
        real=(picture(1), picture(2), picture(3)),
        truths=(Truth("a noto emoji of a {}", picture(4)), Truth("a flat emoji of a {}", picture(5))),
        prior=("a lemon", "a house"),
    )


def test_every_prompt_is_drawn_with_every_seed_and_nothing_twice(questions: Questions, judges: Judges) -> None:
    easel, base = Easel(), Easel(7)
    evaluate(questions, judges, easel, base)
    assert len(easel.asked) == len(set(easel.asked)) == 2 * 2 + 1 + 2
    assert Drawing("a noto emoji of a sks animal", 1) in easel.asked
    assert base.asked == [Drawing("a lemon", 0), Drawing("a house", 0)]


def test_measures_are_the_protocols(questions: Questions, judges: Judges) -> None:
    easel, base, clip = Easel(), Easel(7), judges.clip
    found = evaluate(questions, judges, easel, base).measures
    own = [easel.picture(drawing) for drawing in questions.drawings("sks animal")[:4]]
    texts = ["a noto emoji of an animal"] * 2 + ["an emoji of a red animal"] * 2
    assert found.clip_i == pytest.approx(clip.clip_i(own, questions.real), abs=1e-5)
    assert found.dino == pytest.approx(found.clip_i or 0, abs=1e-5)
    assert found.clip_t == pytest.approx(clip.clip_t(own, texts), abs=1e-5)
    truths = [easel.picture(drawing) for drawing in questions.drawings("sks animal")[4:]]
    pairs = clip.clip_i_pairs(truths, [truth.picture for truth in questions.truths])
    assert found.truth == pytest.approx(sum(pairs) / 2, abs=1e-5)
    prior = [Drawing("a lemon", 0), Drawing("a house", 0)]
    kept = clip.clip_i_pairs(easel(prior), base(prior))
    assert found.prior == pytest.approx(sum(kept) / 2, abs=1e-5)
    alike = (clip.clip_i([own[0]], [own[1]]) + clip.clip_i([own[2]], [own[3]])) / 2
    assert found.diversity == pytest.approx(1 - alike, abs=1e-5)


def test_an_adapter_that_does_nothing_keeps_the_prior(questions: Questions, judges: Judges) -> None:
    assert evaluate(questions, judges, Easel(), Easel()).measures.prior == pytest.approx(1, abs=1e-5)


def test_the_base_is_asked_with_the_noun_and_has_no_prior(questions: Questions, judges: Judges) -> None:
    easel = Easel()
    found = evaluate(questions, judges, easel, None, phrase="animal")
    assert found.measures.prior is None
    assert easel.asked[0] == Drawing("a noto emoji of an animal", 0)


def test_without_dino_its_figures_are_absent(questions: Questions, judges: Judges) -> None:
    found = evaluate(questions, Judges(judges.clip), Easel(), Easel()).measures.to_json()
    assert "clip_i" in found
    assert not any("dino" in name for name in found)


def test_shown_are_the_first_pictures_of_prompts_truths_and_prior(questions: Questions, judges: Judges) -> None:
    easel = Easel()
    shown = evaluate(replace(questions, truth_images=2), judges, easel, Easel()).shown
    wanted = [
        "a noto emoji of a sks animal",
        "an emoji of a red sks animal",
        "a noto emoji of a sks animal",
        "a flat emoji of a sks animal",
        "a lemon",
        "a house",
    ]
    assert [one.tobytes() for one in shown] == [easel.picture(Drawing(prompt, 0)).tobytes() for prompt in wanted]


def test_real_pictures_are_compared_with_each_other(questions: Questions, judges: Judges) -> None:
    a, b, c = questions.real
    clip = judges.clip
    pairs = [clip.clip_i([a], [b]), clip.clip_i([a], [c]), clip.clip_i([b], [c])]
    assert evaluate_real(questions, judges).clip_i == pytest.approx(sum(pairs) / 3, abs=1e-5)


def test_what_was_drawn_is_remembered() -> None:
    easel = Easel()
    draw = remember(easel)
    first = draw([Drawing("a", 0), Drawing("b", 0), Drawing("a", 0)])
    again = draw([Drawing("b", 0), Drawing("c", 0)])
    assert easel.asked == [Drawing("a", 0), Drawing("b", 0), Drawing("c", 0)]
    assert first[0] is first[2]
    assert again[0] is first[1]


def test_a_prompt_without_a_place_is_named(questions: Questions) -> None:
    with pytest.raises(InvalidArgument) as caught:
        replace(questions, truths=(Truth("a fox", picture(1)),))
    assert caught.value.violations[0].field == "truths[0]"
