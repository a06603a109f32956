"""Prompts to contexts: equal to the plain encoder, learned words in place, safe among threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.base_model import BaseModel
from hueshift.engines.text import TextStage


@pytest.fixture(scope="module")
def stage(base_model: BaseModel) -> TextStage:
    """One stage."""
    return TextStage(base_model)


def plain(base: BaseModel, prompt: str) -> torch.Tensor:
    """What a Stable Diffusion pipeline feeds its UNet."""
    ids = base.tokenizer(
        prompt, padding="max_length", max_length=base.max_tokens, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        context: torch.Tensor = base.text_encoder(ids)[0]
    return context[0]


def word_of(base: BaseModel, stage: TextStage) -> str:
    """A word that is one token."""
    for word in ("sks", "cat", "fox", "dog"):
        try:
            stage.token_id(word)
        except InvalidArgument:
            continue
        return word
    raise LookupError(base.name)


@pytest.mark.parametrize("prompt", ["", "a red fox", "a smiling face with sunglasses " * 20])
def test_equals_the_plain_encoder(base_model: BaseModel, stage: TextStage, prompt: str) -> None:
    result = stage.encode([prompt, "something else"], {})
    assert result.context.shape == (2, base_model.max_tokens, base_model.layout.token_width)
    assert torch.allclose(result.context[0], plain(base_model, prompt), atol=1e-5)


def test_counts_truncated_tokens(base_model: BaseModel, stage: TextStage) -> None:
    long = "fox " * 60
    whole = len(base_model.tokenizer(long, verbose=False).input_ids)
    assert stage.encode([long, "fox"], {}).truncated == [whole - base_model.max_tokens, 0]


def test_empty_is_the_empty_prompt(base_model: BaseModel, stage: TextStage) -> None:
    assert torch.allclose(stage.empty, plain(base_model, ""), atol=1e-5)


def test_a_learned_word_takes_the_place_of_its_token(base_model: BaseModel, stage: TextStage) -> None:
    word = word_of(base_model, stage)
    table = base_model.text_encoder.get_input_embeddings().weight
    other = stage.token_id("fox") if word != "fox" else stage.token_id("cat")
    learned = table[other].clone()
    name = base_model.tokenizer.decode([other]).strip()
    as_learned = stage.encode([f"a photo of {word}"], {word: learned[None]}).context
    as_other = stage.encode([f"a photo of {name}"], {}).context
    assert torch.equal(as_learned, as_other)
    # Prompts without the word are untouched, and the weights too.
    assert torch.equal(stage.encode(["a house"], {word: learned}).context, stage.encode(["a house"], {}).context)
    assert not torch.equal(table[stage.token_id(word)], table[other])


def test_the_base_encoder_is_untouched(base_model: BaseModel, stage: TextStage) -> None:
    word = word_of(base_model, stage)
    before = plain(base_model, word)
    stage.encode([word], {word: torch.ones(base_model.layout.token_width)})
    assert torch.equal(plain(base_model, word), before)
    embeddings = base_model.text_encoder.get_input_embeddings()
    assert not embeddings._forward_hooks
    assert stage._encoder.get_input_embeddings().weight.data_ptr() == embeddings.weight.data_ptr()


def test_threads_do_not_see_each_other(base_model: BaseModel, stage: TextStage) -> None:
    word = word_of(base_model, stage)
    width = base_model.layout.token_width
    vectors = [torch.full((width,), 0.02 * i) for i in range(4)]
    alone = [stage.encode([word], {word: vector}).context for vector in vectors]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = list(pool.map(lambda v: stage.encode([word], {word: v}).context, vectors))
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_refuses_words_of_several_tokens_and_odd_shapes(base_model: BaseModel, stage: TextStage) -> None:
    width = base_model.layout.token_width
    with pytest.raises(InvalidArgument, match="exactly one"):
        stage.encode(["x"], {"antidisestablishmentarianism": torch.zeros(width)})
    with pytest.raises(InvalidArgument, match="ordinary token"):
        stage.encode(["x"], {"<|endoftext|>": torch.zeros(width)})
    with pytest.raises(InvalidArgument, match="one vector per word"):
        stage.encode(["x"], {word_of(base_model, stage): torch.zeros(2, width)})
