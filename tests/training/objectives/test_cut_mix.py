"""Cut rows: exact geometry, captions that name both, and the unmix loss on attention made by hand."""

import pytest
import torch
from tiny_training import SECOND_WORD, make_pair_spec, make_task
from torch import Tensor

from hueshift.engines.base_model import BaseModel
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.training.latents import PictureLatents
from hueshift.training.loop import batch_loss, draw_batch
from hueshift.training.objectives.cut_mix import CutMix, Unmix, attention_in_half, cut_caption, middle_half
from hueshift.training.objectives.objective import Batch, Draws, Halves
from hueshift.training.spec import Subject

Tiny = tuple[BaseModel, SpectralFactors]
SUBJECTS = (Subject(identifier="sks", class_noun="cat"), Subject(identifier="idk", class_noun="dog"))


def numbered(count: int, width: int) -> Tensor:
    """Latents [count, 4, 2, width] whose values tell picture and column: 100 * picture + column."""
    columns = torch.arange(width).float().expand(4, 2, width)
    return torch.stack([100 * i + columns for i in range(count)])


def make_batch(rows: int, class_rows: int = 0) -> Batch:
    captions = ("whole",) * rows + ("a cat",) * class_rows
    pictures = torch.cat([torch.zeros(rows), torch.full((class_rows,), -1)]).long()
    total = rows + class_rows
    return Batch(
        torch.full((total, 4, 2, 8), -7.0), torch.zeros(0), torch.zeros(total), torch.ones(total), captions, pictures
    )


def make_mix(probability: float) -> CutMix:
    halves = middle_half(numbered(3, 8))
    exact = PictureLatents(halves, torch.zeros_like(halves))
    classes = {"cat": numbered(1, 8) + 1000, "dog": numbered(1, 8) + 2000}
    return CutMix(SUBJECTS, exact, (0, 0, 1), classes, probability)


def test_the_middle_half_is_the_two_middle_quarters() -> None:
    assert middle_half(torch.arange(8)).tolist() == [2, 3, 4, 5]
    assert middle_half(torch.arange(6)).tolist() == [1, 2, 3]


def test_a_cut_row_joins_two_middle_halves_of_two_subjects_and_nothing_else_moves() -> None:
    draws = Draws(torch.Generator().manual_seed(0))
    seen = set()
    for _ in range(40):
        before = make_batch(4)
        after = make_mix(0.6).rows(before, draws)
        for row in range(4):
            columns = after.clean[row, 0, 0].tolist()
            if row not in after.halves:
                assert torch.equal(after.clean[row], before.clean[row])
                assert (after.captions[row], int(after.pictures[row])) == ("whole", 0)
                continue
            halves = after.halves[row]
            assert halves.pictures is not None
            left, right = halves.pictures
            assert columns == [100 * left + c for c in (2, 3, 4, 5)] + [100 * right + c for c in (2, 3, 4, 5)]
            # Pictures 0 and 1 show subject 0, picture 2 subject 1.
            assert {halves.left, halves.right} == {0, 1}
            assert (left == 2, right == 2) == (halves.left == 1, halves.right == 1)
            assert int(after.pictures[row]) == -1
            seen.add((left, right, after.captions[row]))
    assert {(left, right) for left, right, _ in seen} == {(0, 2), (1, 2), (2, 0), (2, 1)}
    assert {caption for left, _, caption in seen if left == 2} == {
        "a idk dog on the left and a sks cat on the right",
        "a idk dog and a sks cat",
    }


def test_the_probability_is_that_of_a_row_and_zero_draws_from_none() -> None:
    draws = Draws(torch.Generator().manual_seed(1))
    cut = sum(len(make_mix(0.6).rows(make_batch(8), draws).halves) for _ in range(100))
    assert cut / 800 == pytest.approx(0.6, abs=0.05)
    assert make_mix(0.0).rows(make_batch(8), draws).halves == {}


def test_class_rows_are_cut_from_class_pictures_under_nouns_alone() -> None:
    draws = Draws(torch.Generator().manual_seed(2))
    after = make_mix(1.0).rows(make_batch(0, class_rows=6), draws)
    assert len(after.halves) == 6
    for row, halves in after.halves.items():
        begins = {0: 1000, 1: 2000}
        columns = after.clean[row, 0, 0].tolist()
        assert columns == [begins[halves.left] + c for c in (2, 3, 4, 5)] + [
            begins[halves.right] + c for c in (2, 3, 4, 5)
        ]
        assert halves.pictures is None
        assert "sks" not in after.captions[row]
        assert {"cat", "dog"} <= set(after.captions[row].split())


def test_a_dropped_caption_stays_dropped() -> None:
    batch = make_batch(3)
    dropped = Batch(batch.clean, batch.noise, batch.timesteps, batch.weights, ("", "", ""), batch.pictures)
    after = make_mix(1.0).rows(dropped, Draws(torch.Generator().manual_seed(0)))
    assert after.captions == ("", "", "")
    assert len(after.halves) == 3


def test_captions_name_sides_or_join_the_names() -> None:
    assert cut_caption(*SUBJECTS, True) == "a sks cat on the left and a idk dog on the right"
    assert cut_caption(*SUBJECTS, False) == "a sks cat and a idk dog"
    assert cut_caption(*SUBJECTS, False, of_class=True) == "a cat and a dog"
    bare = (Subject(identifier="sks", class_noun=""), SUBJECTS[1])
    assert cut_caption(*bare, False) == "a sks and a idk dog"


def test_attention_in_a_half_is_the_mean_square_there() -> None:
    # One head, a 2x2 map, three tokens; token 1 has 0.1 0.2 / 0.3 0.4, token 2 twice that.
    token = torch.tensor([0.1, 0.2, 0.3, 0.4])
    attention = torch.stack([torch.full((4,), 9.0), token, 2 * token], dim=-1)[None]
    assert attention_in_half(attention, [1], "left").item() == pytest.approx((0.1**2 + 0.3**2) / 2)
    assert attention_in_half(attention, [1], "right").item() == pytest.approx((0.2**2 + 0.4**2) / 2)
    assert attention_in_half(attention, [1, 2], "right").item() == pytest.approx(5 * (0.2**2 + 0.4**2) / 4)
    # The middle column of three belongs to neither half.
    odd = torch.tensor([1.0, 5.0, 2.0] * 3)[None, :, None]
    assert attention_in_half(odd, [0], "left").item() == 1
    assert attention_in_half(odd, [0], "right").item() == 4


def test_the_unmix_loss_looks_at_each_word_over_the_other_subjects_half() -> None:
    # Token 1 is the left subject's word, token 2 the right one's.
    left_word, right_word = torch.tensor([0.9, 0.2, 0.9, 0.4]), torch.tensor([0.1, 0.8, 0.5, 0.8])
    attention = torch.stack([torch.zeros(4), left_word, right_word], dim=-1)[None]
    places = {"sks": [2], "idk": [1]}
    unmix = Unmix(SUBJECTS, lambda caption, word: places[word] if caption else [], 3.0, ["x.attn2"])
    batch = make_batch(2)
    halves = {0: Halves(1, 0, (2, 0))}
    cut = Batch(batch.clean, batch.noise, batch.timesteps, batch.weights, batch.captions, batch.pictures, None, halves)
    loss = unmix.loss(cut, {"x.attn2": {0: attention}})
    expected = 3 * ((0.2**2 + 0.4**2) / 2 + (0.1**2 + 0.5**2) / 2) / 2
    assert loss is not None
    assert loss.item() == pytest.approx(expected)
    assert unmix.watched == ("x.attn2",)
    # Rows of class pictures have no words to keep apart, and no rows nothing to say.
    assert unmix.loss(Batch(*_fields(cut), None, {0: Halves(1, 0)}), {"x.attn2": {0: attention}}) is None
    assert unmix.loss(batch, {}) is None


def test_unmixing_adds_its_gradient_to_a_real_step(tiny: Tiny) -> None:
    spec = make_pair_spec(cut_mix_probability=0.9, unmix_weight=50.0, caption_dropout=0.0, anchor_below=0)
    task, state = make_task(*tiny, spec)
    assert [type(objective) for objective in task.objectives] == [CutMix, Unmix]
    batch = draw_batch(task, state)
    assert batch.halves
    assert all(word in batch.captions[row] for row in batch.halves for word in ("sks", SECOND_WORD))
    with_unmix = batch_loss(task, state.values, batch)
    task.objectives.pop()  # type: ignore[attr-defined]  # a list here
    without = batch_loss(task, state.values, batch)
    assert with_unmix.item() > without.item()
    grads = [
        torch.autograd.grad(loss, [state.values["sigma"], state.values["identifier/1"]])
        for loss in (with_unmix, without)
    ]
    for unmixed, plain in zip(*grads, strict=True):
        assert not torch.equal(unmixed, plain)


def _fields(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[str, ...], Tensor]:
    return batch.clean, batch.noise, batch.timesteps, batch.weights, batch.captions, batch.pictures
