"""A comparison is done once, goes on where it stopped, and tells failures as results."""

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_training import make_pictures

from hueshift.adapters.errors import HueshiftError, InvalidArgument, Reason
from hueshift.training.evaluation.drawing import Painter
from hueshift.training.evaluation.matrix import Matrix, list_cells
from hueshift.training.evaluation.matrix_report import grid_name, write_matrix_report
from hueshift.training.evaluation.plan import Plan, read_plan
from hueshift.training.evaluation.protocol import Judges
from hueshift.training.evaluation.teaching import School

PROJECT = Path(__file__).resolve().parents[3]
PLAN: dict[str, Any] = {
    "cases": [
        {
            "name": "blob",
            "kind": "object",
            "class_noun": "ball",
            "pictures": [{"file": "0.png", "caption": "a sks ball"}, {"file": "1.png", "caption": "a red sks ball"}],
            "truths": [{"file": "2.png", "prompt": "a noto emoji of a {}"}],
        }
    ],
    "methods": [
        {"name": "svdiff", "method": "svdiff", "settings": {"batch_size": 1}},
        {"name": "words", "method": "textual_inversion", "settings": {"batch_size": 1}},
    ],
    "budgets": [{"seconds": 0.01}, {"steps": 2}],
    "prompts": 1,
    "prior": ["a noto emoji of a lemon"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, picture in enumerate(make_pictures()):
        picture.save(tmp_path / f"{number}.png")
    return tmp_path


def make_matrix(folder: Path, painter: Painter, judges: Judges, plan: dict[str, Any] = PLAN, **more: Any) -> Matrix:
    return Matrix(Plan.model_validate(plan), folder, folder / "out", painter=painter, judges=judges, **more)


def test_every_cell_has_a_row_and_is_done_once(folder: Path, painter: Painter, judges: Judges) -> None:
    matrix = make_matrix(folder, painter, judges)
    names = [cell.name for cell in list_cells(matrix.plan)]
    assert names[:3] == ["blob, real", "blob, base", "blob, svdiff, 2 steps, seed 0"]
    assert names[4:] == ["blob, svdiff, 0.01 s, seed 0", "blob, words, 0.01 s, seed 0"]
    rows = list(matrix.run())
    assert [row["cell"] for row in rows] == names
    assert all({"measures", "seconds", "machine", "date", "key"} <= set(row) for row in rows)
    trained = rows[2]
    assert (trained["steps"], trained["adapter_kind"], trained["served"]) == (2, "spectral", True)
    assert set(trained["measures"]) >= {"clip_i", "truth", "clip_t", "prior", "diversity", "dino"}
    timed = rows[4]
    assert timed["steps"] == max(1, round(0.01 / trained["step_seconds"]))
    paces = [json.loads(line) for line in (folder / "out" / "paces.jsonl").read_text().splitlines()]
    assert [pace["cell"] for pace in paces] == ["svdiff, subject", "words, subject"]
    assert trained["step_seconds"] == timed["step_seconds"] == round(paces[0]["step_seconds"], 3)
    again = make_matrix(folder, painter, judges)
    assert list(again.run()) == []
    assert [row["cell"] for row in again.results()] == names


def test_a_stopped_comparison_goes_on(folder: Path, painter: Painter, judges: Judges) -> None:
    first = make_matrix(folder, painter, judges)
    run = first.run()
    done = [next(run)["cell"], next(run)["cell"]]
    run.close()
    rest = make_matrix(folder, painter, judges)
    assert [cell.name for cell in rest.missing()] == [c.name for c in list_cells(rest.plan)][2:]
    assert list(rest.run(0.0)) == []
    assert len(list(rest.run(600))) == 4
    assert done == ["blob, real", "blob, base"]


def test_no_cell_is_begun_that_would_end_too_late(folder: Path, painter: Painter, judges: Judges) -> None:
    """The clock goes on ten seconds whenever it is read: four times in a cell, once before."""
    ticks = count(0, 10)
    matrix = make_matrix(folder, painter, judges, clock=lambda: float(next(ticks)))
    assert len(list(matrix.run(85))) == 2, "begun at 10 and at 50, of 30 seconds each"
    assert len(list(matrix.run(1000))) == 4


def test_a_changed_plan_asks_again_for_what_it_changes(folder: Path, painter: Painter, judges: Judges) -> None:
    list(make_matrix(folder, painter, judges).run())
    slower = {**PLAN["methods"][0], "settings": {"batch_size": 1, "learning_rate": 1e-4}}
    changed = make_matrix(folder, painter, judges, {**PLAN, "methods": [slower, PLAN["methods"][1]]})
    assert {cell.method for cell in changed.missing()} == {"svdiff"}
    assert {row["method"] for row in changed.results()} == {"real", "base", "words"}
    Image.new("RGB", (40, 32), "red").save(folder / "2.png")
    assert len(make_matrix(folder, painter, judges).missing()) == 6


def test_training_that_diverged_is_a_result_and_other_errors_are_not(
    folder: Path, painter: Painter, judges: Judges, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(reason: Reason) -> Any:
        def teach(*_: Any) -> Any:
            raise HueshiftError(reason, "it went wrong at step 3")

        return teach

    monkeypatch.setattr(School, "teach", fail(Reason.TRAINING_DIVERGED))
    plan = {**PLAN, "budgets": [{"steps": 2}], "methods": PLAN["methods"][:1]}
    rows = list(make_matrix(folder, painter, judges, plan).run())
    assert rows[-1]["error"] == "it went wrong at step 3"
    assert make_matrix(folder, painter, judges, plan).missing() == []
    monkeypatch.setattr(School, "teach", fail(Reason.PICTURE_INVALID))
    with pytest.raises(HueshiftError, match="went wrong"):
        list(make_matrix(folder, painter, judges, {**plan, "seeds": [5]}).run())


def test_the_report_has_tables_and_a_grid_for_each_budget(folder: Path, painter: Painter, judges: Judges) -> None:
    matrix = make_matrix(folder, painter, judges, {**PLAN, "budgets": [{"steps": 2}]})
    list(matrix.run())
    paths = write_matrix_report(matrix, "Blobs")
    assert [path.name for path in paths] == ["report.md", "report.json", grid_name("blob", "2 steps")]
    page = paths[0].read_text()
    assert "| svdiff |" in page
    assert grid_name("blob", "2 steps") in page
    assert len(json.loads(paths[1].read_text())["rows"]) == 4
    with Image.open(paths[2]) as grid:
        assert grid.height > 4 * 96


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"budgets": [{"steps": 1, "seconds": 1}]}, "budgets.0"),
        ({"methods": [{"name": "x", "method": "guess"}]}, "methods.0.method"),
        ({"pictures": 3}, "pictures"),
        ({"methods": PLAN["methods"] * 2}, "plan"),
    ],
)
def test_what_is_wrong_with_a_plan_is_named(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**PLAN, **change}))
    with pytest.raises(InvalidArgument) as caught:
        read_plan(path)
    assert field in {violation.field for violation in caught.value.violations}


def test_a_wrong_setting_or_picture_is_told_before_anything_is_trained(
    folder: Path, painter: Painter, judges: Judges
) -> None:
    wrong = {"name": "x", "method": "lora", "settings": {"rank": -1}}
    with pytest.raises(InvalidArgument, match=r"settings\.rank"):
        make_matrix(folder, painter, judges, {**PLAN, "methods": [wrong]})
    (folder / "1.png").write_bytes(b"no picture")
    with pytest.raises(InvalidArgument, match=r"1\.png"):
        make_matrix(folder, painter, judges)


@pytest.mark.parametrize(("name", "cells"), [("methods_cpu", 5 * 2 + 5 * 7 * 2), ("words_cpu", 3 * 2 + 3 * 3 * 2)])
def test_shipped_plans_are_valid_and_their_pictures_are_there(
    shared_dir: Path, painter: Painter, judges: Judges, tmp_path: Path, name: str, cells: int
) -> None:
    plan = read_plan(PROJECT / "benchmarks" / f"{name}.toml")
    matrix = Matrix(plan, shared_dir / "data", tmp_path, painter=painter, judges=judges)
    assert len(matrix.missing()) == cells


def test_the_plan_of_whole_changes_needs_no_pictures_but_the_examples(
    painter: Painter, judges: Judges, tmp_path: Path
) -> None:
    plan = read_plan(PROJECT / "benchmarks" / "whole_cpu.toml")
    matrix = Matrix(plan, PROJECT / "examples" / "pictures", tmp_path, painter=painter, judges=judges)
    assert len(matrix.missing()) == 2 + 3
