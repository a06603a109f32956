"""Run a plan cell by cell: train, draw, measure, one row of results each. What has a row already is not done again."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.errors import HueshiftError, Reason
from hueshift.training.evaluation.drawing import Painter
from hueshift.training.evaluation.grids import read_strip, write_strip
from hueshift.training.evaluation.paces import Paces, count_steps
from hueshift.training.evaluation.plan import Budget, CasePlan, MethodPlan, Plan, make_spec, read_questions
from hueshift.training.evaluation.protocol import Judges, Questions, evaluate, evaluate_real, remember
from hueshift.training.evaluation.rows import Row, append_row, read_rows
from hueshift.training.evaluation.teaching import School, Taught

BASE, REAL = "base", "real"

Progress = Callable[[str, int, int], None]
"""progress(what, done, total)."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of the comparison. Baselines have neither budget nor seed."""

    case: CasePlan
    method: str
    plan: MethodPlan | None = None
    budget: Budget | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """Such as `fox, svdiff, 100 steps, seed 0`."""
        if self.budget is None:
            return f"{self.case.name}, {self.method}"
        return f"{self.case.name}, {self.method}, {self.budget.name}, seed {self.seed}"


def list_cells(plan: Plan) -> list[Cell]:
    """All cells: baselines of every case, then budget by budget, those of steps first."""
    cells = [Cell(case, method) for case in plan.cases for method in (REAL, BASE)]
    budgets = sorted(plan.budgets, key=lambda budget: budget.steps is None)
    return cells + [
        Cell(case, method.name, method, budget, seed)
        for budget in budgets
        for seed in plan.seeds
        for case in plan.cases
        for method in plan.methods
    ]


class Matrix:
    """A plan with all that it takes. `root` has its pictures; `out` gets rows, adapters and strips of pictures."""

    def __init__(
        self,
        plan: Plan,
        root: Path,
        out: Path,
        *,
        painter: Painter,
        judges: Judges,
        rows: Path | None = None,
        progress: Progress | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read every picture. Raises InvalidArgument naming what cannot be read or is set wrong."""
        self.plan, self.out = plan, out
        self._clock = clock
        self.rows = rows or out / "rows.jsonl"
        self._painter, self._judges = painter, judges
        self._progress = progress or (lambda what, done, total: None)
        self._school = School(painter.base, painter.engine.factors, out / "adapters")
        self._questions = {case.name: read_questions(plan, case, root) for case in plan.cases}
        self._draw_base = remember(painter.draw)
        self._paces = Paces(
            out / "paces.jsonl", lambda case, spec: self._school.step_seconds(spec, self._questions[case.name].real)
        )
        for case in plan.cases:
            for method in plan.methods:
                make_spec(case, method, 1, 0)

    def questions(self, case: CasePlan) -> Questions:
        """What is asked of a case."""
        return self._questions[case.name]

    def missing(self) -> list[Cell]:
        """Cells without a row, or whose row is of another question."""
        done = {(row["cell"], row["key"]) for row in read_rows(self.rows)}
        return [cell for cell in list_cells(self.plan) if (cell.name, self.key(cell)) not in done]

    def run(self, max_seconds: float | None = None) -> Generator[Row, None, None]:
        """Do what is missing and yield each new row, which is in the file by then.

        With `max_seconds` no cell is begun that would, taking as long as the longest so far, end after it. A cell that
        fails because its training diverged is a result too: its row has `error` in the place of measures. Where the
        plan counts seconds, what a step takes is measured first: leave the machine alone until the first cell.
        """
        if self._timed and self.missing():
            self._paces.measure(self.plan.cases, self.plan.methods)
        begun, longest = self._clock(), 0.0
        for cell in self.missing():
            start = self._clock()
            if max_seconds is not None and start - begun + longest > max_seconds:
                return
            row = self._row(cell)
            append_row(self.rows, row)
            yield row
            longest = max(longest, self._clock() - start)

    def key(self, cell: Cell) -> str:
        """Hash of all that a cell's result depends on."""
        questions = self._questions[cell.case.name]
        spec = None if cell.plan is None else make_spec(cell.case, cell.plan, 1, cell.seed).to_json()
        asked = {
            "spec": spec,
            "budget": None if cell.budget is None else cell.budget.name,
            "base": self._painter.base.base_hash,
            "prompts": [questions.phrase, questions.noun, *questions.prompts, *questions.prior],
            "images": [questions.images, questions.truth_images, questions.prior_images],
            "sampling": [self._painter.steps, self._painter.guidance, self._painter.table.kind],
            "dino": self._judges.dino is not None,
        }
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
        for picture in (*questions.real, *(truth.picture for truth in questions.truths)):
            digest.update(picture.tobytes())
        return digest.hexdigest()[:16]

    def results(self) -> list[dict[str, Any]]:
        """Rows of this plan's cells, in the cells' order; rows of an earlier plan are left out."""
        done = {(row["cell"], row["key"]): row for row in read_rows(self.rows)}
        asked = [(cell.name, self.key(cell)) for cell in list_cells(self.plan)]
        return [done[one] for one in asked if one in done]

    def strip(self, cell: Cell) -> list[Image.Image]:
        """The pictures that a finished cell showed; none if they are not there."""
        return read_strip(self._strip_path(cell))

    def _row(self, cell: Cell) -> Row:
        begun = self._clock()
        self._progress(cell.name, 0, 1)
        questions = self._questions[cell.case.name]
        row = {
            "cell": cell.name,
            "case": cell.case.name,
            "kind": cell.case.kind.value,
            "method": cell.method,
            "budget": None if cell.budget is None else cell.budget.name,
            "seed": cell.seed,
            "key": self.key(cell),
        }
        try:
            row |= self._result(cell, questions)
        except HueshiftError as error:
            if error.reason is not Reason.TRAINING_DIVERGED:
                raise
            row["error"] = error.message
        self._progress(cell.name, 1, 1)
        return {**row, "seconds": round(self._clock() - begun, 1), **_where()}

    def _result(self, cell: Cell, questions: Questions) -> dict[str, Any]:
        if cell.method == REAL:
            write_strip(self._strip_path(cell), questions.real)
            return {"measures": evaluate_real(questions, self._judges).to_json()}
        if cell.plan is None or cell.budget is None:
            report = partial(self._progress, f"{cell.name}: draw")
            found = evaluate(
                questions,
                self._judges,
                lambda drawings: self._painter.draw(drawings, report=report),
                None,
                phrase=questions.noun,
            )
            write_strip(self._strip_path(cell), found.shown)
            return {"measures": found.measures.to_json()}
        adapter, facts = self._teach(cell, cell.plan, cell.budget, questions)
        report = partial(self._progress, f"{cell.name}: draw")
        mix = [(adapter, 1.0)]
        found = evaluate(
            questions, self._judges, lambda drawings: self._painter.draw(drawings, mix, report), self._draw_base
        )
        write_strip(self._strip_path(cell), found.shown)
        return {"measures": found.measures.to_json(), **facts, "served": self._painter.serves(adapter)}

    def _teach(
        self, cell: Cell, method: MethodPlan, budget: Budget, questions: Questions
    ) -> tuple[Adapter, dict[str, Any]]:
        pace = self._paces.step_seconds(cell.case, method) if self._timed else None
        steps = count_steps(budget, pace)
        spec = make_spec(cell.case, method, steps, cell.seed)
        taught = self._school.teach(spec, questions.real, partial(self._progress, f"{cell.name}: train"))
        return taught.adapter, _facts(taught, steps, pace or taught.step_seconds)

    @property
    def _timed(self) -> bool:
        return any(budget.seconds is not None for budget in self.plan.budgets)

    def _strip_path(self, cell: Cell) -> Path:
        name = "-".join(cell.name.replace(",", "").split())
        return self.out / "strips" / f"{name}-{self.key(cell)}.png"


def _facts(taught: Taught, steps: int, step_seconds: float | None) -> dict[str, Any]:
    return {
        "steps": steps,
        "step_seconds": None if step_seconds is None else round(step_seconds, 3),
        "loss": round(taught.loss, 4),
        "kept_energy": None if taught.kept_energy is None else round(taught.kept_energy, 3),
        "bytes": taught.bytes,
        "adapter_kind": taught.adapter.kind.value,
    }


def _where() -> Mapping[str, Any]:
    return {
        "machine": f"{os.cpu_count()}-core {platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "date": datetime.now(UTC).date().isoformat(),
    }
