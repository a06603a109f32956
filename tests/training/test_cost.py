"""What jobs cost, from what jobs took."""

from pathlib import Path
from typing import Any

import pytest
from tiny_training import make_spec

from hueshift.training.cost import SpeedBook
from hueshift.training.spec import Method


def test_a_job_costs_its_steps_times_what_a_step_took(tmp_path: Path) -> None:
    book = SpeedBook(tmp_path / "speeds.json")
    spec = make_spec(steps=200, batch_size=4)
    assert book.estimate("base", spec) is None
    book.record("base", spec, steps=50, seconds=25.0)
    cost = SpeedBook(tmp_path / "speeds.json").estimate("base", spec)
    assert cost is not None
    assert (cost.seconds, cost.seconds_per_step, cost.measured_steps) == (100.0, 0.5, 50)
    # Another method or base is another matter.
    assert book.estimate("base", make_spec(Method.LORA)) is None
    assert book.estimate("other", spec) is None


def test_other_sizes_of_step_are_taken_in_proportion_to_the_nearest(tmp_path: Path) -> None:
    book = SpeedBook(tmp_path / "speeds.json")
    book.record("base", make_spec(batch_size=4), 10, 10.0)
    book.record("base", make_spec(batch_size=16), 10, 20.0)

    def per_step(**given: Any) -> float:
        cost = book.estimate("base", make_spec(steps=10, **given))
        assert cost is not None
        return cost.seconds_per_step

    assert per_step(batch_size=4) == 1.0
    assert per_step(batch_size=2) == 0.5
    assert per_step(batch_size=4, gradient_accumulation=3) == pytest.approx(1.5)
    # Class pictures double the rows.
    assert per_step(batch_size=8, prior_weight=1.0) == 2.0


def test_all_weights_cost_other_steps_than_a_few(tmp_path: Path) -> None:
    book = SpeedBook(tmp_path / "speeds.json")
    every, few = make_spec(Method.DREAMBOOTH, rank=0), make_spec(Method.DREAMBOOTH, targets=("proj_out",))
    book.record("base", every, 10, 30.0)
    assert book.estimate("base", few) is None
    book.record("base", few, 10, 10.0)
    found = [book.estimate("base", spec) for spec in (every, few)]
    assert [cost and cost.seconds_per_step for cost in found] == [3.0, 1.0]


def test_old_steps_fade(tmp_path: Path) -> None:
    book = SpeedBook(tmp_path / "speeds.json")
    spec = make_spec(steps=1)
    book.record("base", spec, 1000, 1000.0)
    book.record("base", spec, 500, 5.0)
    cost = book.estimate("base", spec)
    assert cost is not None
    assert cost.measured_steps == 1000
    assert cost.seconds_per_step == pytest.approx((500 * 1.0 + 5.0) / 1000)
    book.record("base", spec, 0, 0.0)
    assert book.estimate("base", spec) == cost


def test_a_broken_book_is_begun_anew(tmp_path: Path) -> None:
    file = tmp_path / "speeds.json"
    file.write_text("{")
    book = SpeedBook(file)
    assert book.estimate("base", make_spec()) is None
    book.record("base", make_spec(), 1, 1.0)
    assert book.estimate("base", make_spec()) is not None
