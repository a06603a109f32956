"""Prompts with a place for what was learned."""

from pathlib import Path

import pytest

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.base_model import BaseModel
from hueshift.training.evaluation.prompts import (
    CaseKind,
    case_prompts,
    check_places,
    fill,
    prior_prompts,
    read_prompts,
)


@pytest.mark.parametrize(
    ("prompt", "phrase", "filled"),
    [
        ("a noto emoji of a {}", "sks animal", "a noto emoji of a sks animal"),
        ("a noto emoji of a {}", "animal", "a noto emoji of an animal"),
        ("A {} of a bell", "emoji", "An emoji of a bell"),
        ("an {} of a bell", "sks emoji", "a sks emoji of a bell"),
        ("an emoji of a red {}", "instrument", "an emoji of a red instrument"),
        ("a {} of a bell", "", "a of a bell"),
    ],
)
def test_the_article_fits_the_phrase(prompt: str, phrase: str, filled: str) -> None:
    assert fill(prompt, phrase) == filled


@pytest.mark.parametrize("kind", list(CaseKind))
def test_stored_prompts_fit_the_embedded_model(kind: CaseKind, base_model: BaseModel) -> None:
    prompts = case_prompts(kind)
    check_places(prompts, "prompts")
    assert len(set(prompts)) == len(prompts) == 10
    assert case_prompts(kind, 3) == prompts[:3]
    longest = max(len(base_model.tokenizer(fill(prompt, "sks instrument")).input_ids) for prompt in prompts)
    assert longest <= base_model.max_tokens
    assert not any("{}" in prompt for prompt in prior_prompts())


def test_lists_of_ones_own_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text('["a {} in the jungle"]')
    assert read_prompts(path) == ("a {} in the jungle",)
    for wrong in ("{", '{"a": 1}', "[1]"):
        path.write_text(wrong)
        with pytest.raises(InvalidArgument, match=r"prompts\.json"):
            read_prompts(path)
    with pytest.raises(InvalidArgument) as caught:
        check_places(["a {}", "none"], "prompts")
    assert caught.value.violations[0].field == "prompts[1]"
