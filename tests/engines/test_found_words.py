"""Where plain and learned words stand among a prompt's tokens."""

import pytest

from hueshift.engines.base_model import BaseModel
from hueshift.engines.text import TextStage


@pytest.fixture(scope="module")
def stage(base_model: BaseModel) -> TextStage:
    """One stage."""
    return TextStage(base_model)


def texts(base: BaseModel, ids: tuple[int, ...], groups: tuple[tuple[int, ...], ...]) -> list[str]:
    return [base.tokenizer.decode([ids[place] for place in group]).replace(" ", "") for group in groups]


@pytest.mark.parametrize(
    ("prompt", "word", "found"),
    [
        ("a photo of a dog", "dog", ["dog"]),
        ("Dog, dog! A DOG's dog", "dog", ["dog", "dog", "dog", "dog"]),
        ("a hotdog and two doggos, dogs", "dog", []),
        ("a hotdog", "hotdog", ["hotdog"]),
        ("antidisestablishmentarianism wins", "antidisestablishmentarianism", ["antidisestablishmentarianism"]),
        ("a teddy  bear, teddy\nbear, teddybear", "Teddy bear", ["teddybear", "teddybear"]),
        ("a cat", "dog", []),
        ("", "dog", []),
        ("a (dog) <s1> b", "<s1>", ["<s1>"]),
        ("über dog: ünder", "dog", ["dog"]),
    ],
)
def test_plain_words(base_model: BaseModel, stage: TextStage, prompt: str, word: str, found: list[str]) -> None:
    row = stage.tokenize(prompt, {}, [word])
    assert texts(base_model, row.ids, row.found[word]) == found
    assert row.ids == stage.tokenize(prompt, {}).ids


def test_learned_words_with_several_vectors_and_phrases_with_them(stage: TextStage) -> None:
    row = stage.tokenize("a sks dog and a dog, SKS dog", {"sks": 3}, ["sks", "dog", "sks dog"])
    assert row.found["sks"] == row.places["sks"] == ((2, 3, 4), (10, 11, 12))
    assert row.found["dog"] == ((5,), (8,), (13,))
    assert row.found["sks dog"] == ((2, 3, 4, 5), (10, 11, 12, 13))


def test_what_was_cut_off_is_not_there(base_model: BaseModel, stage: TextStage) -> None:
    room = base_model.max_tokens - 2
    row = stage.tokenize("a " * (room - 1) + "teddy bear", {}, ["teddy", "bear", "teddy bear"])
    assert row.truncated == 1
    assert row.found == {"teddy": ((room,),), "bear": (), "teddy bear": ()}
