"""The numbers of an evaluation, against values worked out by hand."""

import math

import pytest
import torch

from hueshift.training.evaluation.measures import (
    Measures,
    diversity,
    diversity_of,
    mean_cosine,
    mutual_cosine,
    paired_cosine,
)

EAST, NORTH, WEST = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 0.0])
NORTH_EAST = torch.tensor([math.sqrt(0.5), math.sqrt(0.5)])


def test_all_pairs_and_pairs_at_one_place() -> None:
    drawn, real = torch.stack([EAST, NORTH]), torch.stack([EAST, NORTH_EAST])
    assert mean_cosine(drawn, real) == pytest.approx((1 + 0 + 2 * math.sqrt(0.5)) / 4)
    assert paired_cosine(drawn, real) == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_pictures_against_each_other_leave_themselves_out() -> None:
    assert mutual_cosine(torch.stack([EAST, NORTH, WEST])) == pytest.approx((0 - 1 + 0) / 3)
    assert mutual_cosine(EAST[None]) is None


def test_diversity_is_within_prompts_only() -> None:
    groups = [torch.stack([EAST, EAST]), torch.stack([EAST, NORTH])]
    assert diversity(groups) == pytest.approx((0 + 1) / 2)
    rows = torch.stack([EAST, EAST, EAST, NORTH])
    assert diversity_of(rows, ["a", "b", "a", "b"]) == pytest.approx(0.5)
    assert diversity_of(rows, ["a", "b", "c", "d"]) is None


def test_only_what_was_measured_is_told() -> None:
    assert Measures(clip_i=0.123456, prior=1.0).to_json() == {"clip_i": 0.1235, "prior": 1.0}
