"""One adapter against its baselines: rows of results, a grid and a report."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from hueshift.training.evaluation.drawing import Draw
from hueshift.training.evaluation.grids import GridRow, draw_grid
from hueshift.training.evaluation.matrix import BASE, REAL
from hueshift.training.evaluation.prompts import fill
from hueshift.training.evaluation.protocol import Judges, Questions, evaluate, evaluate_real, remember
from hueshift.training.evaluation.tables import missing_words, report


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Rows of the real pictures, the base model and the adapter, and a grid of what they drew."""

    rows: tuple[dict[str, Any], ...]
    grid: Image.Image

    def page(self, title: str) -> str:
        """The report in Markdown."""
        return report(self.rows, title)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {"rows": list(self.rows), "missing": missing_words(self.rows)}


def compare(questions: Questions, judges: Judges, draw: Draw, draw_base: Draw, *, name: str, kind: str) -> Comparison:
    """Measure an adapter, which `draw` draws with, beside the base model with the class noun and the real pictures."""
    base = remember(draw_base)
    plain = evaluate(questions, judges, base, None, phrase=questions.noun)
    own = evaluate(questions, judges, draw, base)
    measured = {REAL: evaluate_real(questions, judges), BASE: plain.measures, name: own.measures}
    rows = tuple(
        {
            "cell": f"{name}, {method}",
            "case": name,
            "kind": kind,
            "method": method,
            "budget": None,
            "seed": 0,
            "measures": measures.to_json(),
        }
        for method, measures in measured.items()
    )
    shown = [
        GridRow("learned from", questions.real[: len(own.shown)]),
        GridRow("base model", plain.shown),
        GridRow(name, own.shown),
    ]
    return Comparison(rows, draw_grid(shown, headings(questions)))


def headings(questions: Questions) -> list[str]:
    """Prompts in the order in which evaluations show pictures."""
    places = [*questions.prompts, *(truth.prompt for truth in questions.truths)]
    return [*(fill(prompt, questions.phrase) for prompt in places), *questions.prior]


def write_comparison(comparison: Comparison, out: Path, title: str) -> Sequence[Path]:
    """Write report.md, report.json and grid.png to `out`, and return their paths."""
    paths = [out / name for name in ("report.md", "report.json", "grid.png")]
    out.mkdir(parents=True, exist_ok=True)
    paths[0].write_text(comparison.page(title) + "\n![grid](grid.png)\n", encoding="utf-8")
    paths[1].write_text(json.dumps(comparison.to_json(), indent=2) + "\n", encoding="utf-8")
    comparison.grid.save(paths[2], optimize=True)
    return paths
