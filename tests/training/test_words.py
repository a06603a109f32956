"""The learned word: where it starts, how it reaches captions, and that only it is learned."""

from dataclasses import replace

import pytest
import torch
from tiny_training import make_spec

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.base_model import BaseModel
from hueshift.engines.text import TextStage
from hueshift.training.words import Captions


@pytest.fixture(scope="module")
def text(base_model: BaseModel) -> TextStage:
    return TextStage(base_model)


def own_embedding(base: BaseModel, word: str) -> torch.Tensor:
    ids = base.tokenizer(word, add_special_tokens=False).input_ids
    table: torch.Tensor = base.text_encoder.get_input_embeddings().weight
    return table[ids].mean(0)


def test_it_starts_as_itself_or_as_the_mean_of_known_words(base_model: BaseModel, text: TextStage) -> None:
    captions = Captions(base_model, text, make_spec())
    assert torch.equal(captions.initial()["identifier"][0, 0], own_embedding(base_model, "sks"))
    started = Captions(base_model, text, replace(make_spec(), identifier_init=("flat", "modern")))
    expected = (own_embedding(base_model, "flat") + own_embedding(base_model, "modern")) / 2
    assert torch.allclose(started.initial()["identifier"][0, 0], expected, atol=1e-6)


def test_training_and_serving_encode_alike(base_model: BaseModel, text: TextStage) -> None:
    captions = Captions(base_model, text, make_spec())
    embedding = captions.initial()["identifier"] + 0.3 * torch.randn(256, generator=torch.Generator().manual_seed(0))
    prompts = ["a sks animal", "", "a noto emoji of a sks animal", "a sks animal"]
    trained = captions.contexts(prompts, {"identifier": embedding.requires_grad_()})
    served = text.encode(prompts, captions.tokens({"identifier": embedding})[0]).context
    assert torch.allclose(trained, served, atol=1e-5)
    assert not torch.allclose(served[0], text.encode(["a sks animal"], {}).context[0], atol=1e-3)


def test_only_the_embedding_gets_a_gradient_and_only_from_captions_with_the_word(
    base_model: BaseModel, text: TextStage
) -> None:
    captions = Captions(base_model, text, make_spec())
    embedding = captions.initial()["identifier"].requires_grad_()
    captions.contexts(["a sks animal"], {"identifier": embedding}).square().sum().backward()  # type: ignore[no-untyped-call]
    assert embedding.grad is not None
    assert embedding.grad.abs().max() > 0
    assert not captions.contexts(["a flat emoji of a lemon"], {"identifier": embedding}).requires_grad
    assert all(parameter.grad is None for parameter in base_model.text_encoder.parameters())


def test_what_is_not_learned_is_not_in_the_adapter(base_model: BaseModel, text: TextStage) -> None:
    plain = Captions(base_model, text, replace(make_spec(), learn_identifier=False))
    assert not plain.learns
    assert plain.tokens({}) == ({}, {})
    held = Captions(base_model, text, replace(make_spec(), identifier_learning_rate=0.0))
    assert not held.learns
    assert torch.equal(held.tokens({})[0]["sks"][0], own_embedding(base_model, "sks"))


def test_words_that_do_not_fit_are_refused(base_model: BaseModel, text: TextStage) -> None:
    with pytest.raises(InvalidArgument, match="one ordinary token"):
        Captions(base_model, text, replace(make_spec(), identifier="zzyzxqwv"))
    with pytest.raises(InvalidArgument, match="vocabulary"):
        Captions(base_model, text, replace(make_spec(), identifier_init=("<|endoftext|>",))).initial()
