"""Prompts to contexts: equal to the plain encoder, learned words in place, safe among threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from plain_text import encode_taught

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
    assert next(stage._towers[0].embeddings.parameters()).data_ptr() == embeddings.weight.data_ptr()


def test_threads_do_not_see_each_other(base_model: BaseModel, stage: TextStage) -> None:
    word = word_of(base_model, stage)
    width = base_model.layout.token_width
    vectors = [torch.full((width,), 0.02 * i) for i in range(4)]
    alone = [stage.encode([word], {word: vector}).context for vector in vectors]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = list(pool.map(lambda v: stage.encode([word], {word: v}).context, vectors))
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def embeddings(base: BaseModel, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.05 * torch.randn(count, base.layout.token_width, generator=generator)


LONG = "antidisestablishmentarianism"


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("word", ["sks", LONG, "<art>", "two words"])
def test_a_word_of_any_tokens_takes_as_many_places_as_it_has_vectors(
    base_model: BaseModel, stage: TextStage, word: str, vectors: int
) -> None:
    learned = embeddings(base_model, vectors)
    found = stage.encode([f"a photo of {word}, red", f"a photo of ({word.upper()})"], {word: learned})
    assert torch.allclose(
        found.context[0], encode_taught(base_model, learned, "a photo of", vectors, ", red"), atol=1e-5
    )
    assert torch.allclose(found.context[1], encode_taught(base_model, learned, "a photo of (", vectors, ")"), atol=1e-5)
    assert found.truncated == [0, 0]


def test_a_word_inside_of_another_is_none(base_model: BaseModel, stage: TextStage) -> None:
    prompts = ["sksy and asks", "a house"]
    learned = {"sks": embeddings(base_model, 2)}
    assert torch.equal(stage.encode(prompts, learned).context, stage.encode(prompts, {}).context)


def test_the_longest_word_wins(base_model: BaseModel, stage: TextStage) -> None:
    short, long = embeddings(base_model, 1, 1), embeddings(base_model, 2, 2)
    words = {"<art>": short, "<art> deco": long}
    found = stage.encode(["a <art> deco <art>"], words).context[0]
    expected = encode_taught(base_model, torch.cat([long, short]), "a", 2, 1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_word_cut_in_the_middle_is_not_there(base_model: BaseModel, stage: TextStage) -> None:
    room = base_model.max_tokens - 2
    learned = embeddings(base_model, 3)
    fits = stage.tokenize("fox " * (room - 3) + "<art>", {"<art>": 3})
    assert (fits.truncated, fits.places) == (0, {"<art>": (tuple(range(room - 2, room + 1)),)})
    cut = stage.tokenize("fox " * (room - 2) + "<art> fox", {"<art>": 3})
    assert (cut.truncated, dict(cut.places)) == (2, {})
    whole = encode_taught(base_model, learned, "fox " * (room - 3), 3)
    assert torch.allclose(stage.encode_rows([fits], [{"<art>": learned}])[0], whole, atol=1e-5)


def test_every_occurrence_is_replaced_in_its_own_row(base_model: BaseModel, stage: TextStage) -> None:
    one, other = embeddings(base_model, 2, 1), embeddings(base_model, 2, 2)
    row = stage.tokenize("<art> and <art>", {"<art>": 2})
    found = stage.encode_rows([row, row], [{"<art>": one}, {"<art>": other}])
    for context, vectors in zip(found, (one, other), strict=True):
        expected = encode_taught(base_model, torch.cat([vectors, vectors]), 2, "and", 2)
        assert torch.allclose(context, expected, atol=1e-5)


def test_gradients_reach_the_vectors_alone(base_model: BaseModel, stage: TextStage) -> None:
    learned = embeddings(base_model, 2).requires_grad_()
    unused = embeddings(base_model, 1).requires_grad_()
    out = stage.encode_differentiably(["a <art>"], {"<art>": learned, "sks": unused}).context
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()  # type: ignore[no-untyped-call]
    assert unused.grad is None
    assert learned.grad is not None
    step = torch.randn(learned.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        sums = [
            (stage.encode(["a <art>"], {"<art>": learned + sign * 1e-3 * step}).context * weights).double().sum()
            for sign in (1, -1)
        ]
    slope = float((sums[0] - sums[1]) / 2e-3)
    assert slope == pytest.approx(float((learned.grad * step).sum()), rel=2e-2)


def test_refuses_odd_shapes(base_model: BaseModel, stage: TextStage) -> None:
    width = base_model.layout.token_width
    for shape in ((width + 1,), (0, width), (1, 1, width)):
        with pytest.raises(InvalidArgument, match=r"allowed are \["):
            stage.encode(["x"], {"sks": torch.zeros(shape)})


def test_token_id_refuses_what_is_not_one_ordinary_token(stage: TextStage) -> None:
    for word in (LONG, "<|endoftext|>"):
        with pytest.raises(InvalidArgument, match="exactly one"):
            stage.token_id(word)
