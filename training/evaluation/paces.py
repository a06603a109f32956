"""How fast each method trains on a machine with nothing else to do, measured before a comparison counts seconds.

A cell's own steps tell less: whatever else runs meanwhile slows them, and a comparison takes hours. With paces the
cells may share their machine with other work, and still get the steps that fit their seconds on an idle one.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from hueshift.training.evaluation.plan import Budget, CasePlan, MethodPlan, make_spec
from hueshift.training.evaluation.rows import append_row, read_rows
from hueshift.training.spec import TrainingSpec

# The first step of a job takes up to twice as long as the others; the median of nine does not see it.
_PROBE_STEPS = 9

Probe = Callable[[CasePlan, TrainingSpec], float]
"""probe(case, job) trains and returns the median seconds of a step."""


class Paces:
    """Seconds of a training step for each method and kind of case, kept in a file of rows."""

    def __init__(self, path: Path, probe: Probe) -> None:
        self._path, self._probe = path, probe

    def measure(self, cases: Sequence[CasePlan], methods: Sequence[MethodPlan]) -> None:
        """Measure whatever is not known. Raises what training raises."""
        for case in cases:
            for method in methods:
                self.step_seconds(case, method)

    def step_seconds(self, case: CasePlan, method: MethodPlan) -> float:
        """Pace of a method on the first case of that kind asked for; measured at most once."""
        spec = make_spec(case, method, _PROBE_STEPS, 0)
        name = f"{method.name}, {case.subject_kind.value}"
        for row in read_rows(self._path):
            if row["cell"] == name and row["settings"] == dict(method.settings):
                return float(row["step_seconds"])
        seconds = round(self._probe(case, spec), 4)
        append_row(self._path, {"cell": name, "settings": dict(method.settings), "step_seconds": seconds})
        return seconds


def count_steps(budget: Budget, step_seconds: float | None) -> int:
    """Steps that a budget allows. Raises ValueError for a budget of seconds without a pace."""
    if budget.steps is not None:
        return budget.steps
    if budget.seconds is None or step_seconds is None:
        raise ValueError(f"a budget of {budget.name} needs the seconds of a step")
    return max(1, round(budget.seconds / step_seconds))
