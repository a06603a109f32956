"""The learned word: where it starts, how it reaches captions, and that only it is learned."""

from dataclasses import replace

import pytest
import torch
from tiny_training import SECOND_WORD, make_pair_spec, make_spec

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


def test_several_vectors_take_several_places_and_start_from_words_in_turn(
    base_model: BaseModel, text: TextStage
) -> None:
    spec = replace(make_spec(token_vectors=3), identifier_init=("flat", "modern"))
    captions = Captions(base_model, text, spec)
    start = captions.initial()["identifier"]
    assert start.shape == (1, 3, 256)
    flat, modern = (own_embedding(base_model, word) for word in ("flat", "modern"))
    assert [torch.equal(start[0, i], expected) for i, expected in enumerate((flat, modern, flat))] == [True] * 3
    assert captions.places("a noto sks animal", "sks") == [3, 4, 5]
    assert captions.places("a noto animal", "sks") == []
    # The vectors are different places, so they learn apart even from equal starts.
    alike = Captions(base_model, text, make_spec(token_vectors=2))
    embedding = alike.initial()["identifier"].requires_grad_()
    alike.contexts(["a sks animal"], {"identifier": embedding}).square().sum().backward()  # type: ignore[no-untyped-call]
    assert embedding.grad is not None
    assert not torch.equal(embedding.grad[0, 0], embedding.grad[0, 1])


def test_each_subject_has_its_word_and_its_gradient(base_model: BaseModel, text: TextStage) -> None:
    captions = Captions(base_model, text, make_pair_spec())
    values = {name: start.requires_grad_() for name, start in captions.initial().items()}
    assert list(values) == ["identifier", "identifier/1"]
    captions.contexts([f"a {SECOND_WORD} ball"], values).square().sum().backward()  # type: ignore[no-untyped-call]
    assert values["identifier"].grad is None or not values["identifier"].grad.any()
    assert values["identifier/1"].grad is not None
    assert values["identifier/1"].grad.any()
    assert set(captions.tokens(values)[0]) == {"sks", SECOND_WORD}


def test_words_by_layer_make_a_context_for_each(base_model: BaseModel, text: TextStage) -> None:
    captions = Captions(base_model, text, make_spec(per_layer=True))
    layers = len(base_model.layout.cross_attentions)
    start = captions.initial()["identifier"]
    assert start.shape == (layers, 1, 256)
    moved = start + torch.arange(layers).view(-1, 1, 1) * 0.05
    contexts = captions.contexts(["a sks animal", ""], {"identifier": moved}).chunk(layers, dim=-1)
    for layer, context in enumerate(contexts):
        expected = text.encode(["a sks animal"], {"sks": moved[layer]}).context[0]
        assert torch.allclose(context[0], expected, atol=1e-5)
        assert torch.equal(context[1], text.empty)
    assert captions.tokens({"identifier": moved})[1]["sks"].shape == (1, layers, 1, 256)
