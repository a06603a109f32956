"""Rows of results as Markdown: means over cases and seeds for each method, and what each case scored."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

Rows = Sequence[dict[str, Any]]

_MEASURES = ("clip_i", "truth", "dino", "clip_t", "prior", "diversity", "dino_diversity")
_HEADINGS = {
    "clip_i": "CLIP-I",
    "truth": "CLIP-I, truth",
    "dino": "DINO",
    "clip_t": "CLIP-T",
    "prior": "prior kept",
    "diversity": "diversity",
    "dino_diversity": "diversity, DINO",
}
_NO_DINO = "DINO was not measured: no folder of its weights was given."


def summary_table(rows: Rows, budget: str, *, style: bool) -> list[str]:
    """Lines of the table of methods under one budget, of all subjects or all styles; baselines come first.

    Every figure is the mean over cases and seeds. A method of which a cell diverged says so.
    """
    chosen = [row for row in rows if row["budget"] in (None, budget) and (row["kind"] == "style") is style]
    methods = list(dict.fromkeys(row["method"] for row in chosen))
    measures = _present(chosen)
    trained = any("steps" in row for row in chosen)
    costs = ["steps", "s a step", "s to train", "size", "cells"] if trained else []
    head = ["method", *(_HEADINGS[name] for name in measures), *costs]
    lines = [_line(head), _line(["---"] * len(head))]
    for method in methods:
        own = [row for row in chosen if row["method"] == method]
        lines.append(_line([method, *_cells(own, measures), *(_costs(own) if trained else [])]))
    return lines


def case_table(rows: Rows) -> list[str]:
    """Lines of the table of every cell."""
    measures = _present(rows)
    head = ["case", "method", "budget", "seed", *(_HEADINGS[name] for name in measures), "steps"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        lines.append(
            _line(
                [
                    row["case"],
                    row["method"],
                    row["budget"] or "–",
                    "–" if row["budget"] is None else str(row["seed"]),
                    *_cells([row], measures),
                    str(row.get("steps") or "–"),
                ]
            )
        )
    return lines


def missing_words(rows: Rows) -> str:
    """What was not measured, in words; empty if everything was."""
    return "" if any("dino" in row.get("measures", {}) for row in rows) else _NO_DINO


def report(rows: Rows, title: str) -> str:
    """A whole page: a table for each budget, then every cell."""
    parts = [f"# {title}", ""]
    if words := missing_words(rows):
        parts += [words, ""]
    budgets = list(dict.fromkeys(row["budget"] for row in rows if row["budget"] is not None))
    for budget in budgets or ["-"]:
        for style, what in ((False, "subjects"), (True, "styles")):
            if any((row["kind"] == "style") is style for row in rows):
                parts += [f"## {what}: {budget}" if budgets else f"## {what}", ""]
                parts += [*summary_table(rows, budget, style=style), ""]
    parts += ["## Every cell", "", *case_table(rows), ""]
    return "\n".join(parts)


def _present(rows: Rows) -> list[str]:
    return [name for name in _MEASURES if any(name in row.get("measures", {}) for row in rows)]


def _cells(rows: Rows, measures: Sequence[str]) -> list[str]:
    return [_mean([row["measures"][name] for row in rows if name in row.get("measures", {})], 3) for name in measures]


def _costs(rows: Rows) -> list[str]:
    steps = [row["steps"] for row in rows if row.get("steps")]
    seconds = [row["step_seconds"] for row in rows if row.get("step_seconds")]
    trained = [row["steps"] * row["step_seconds"] for row in rows if row.get("step_seconds")]
    sizes = [row["bytes"] / 1000 for row in rows if row.get("bytes")]
    failed = sum("error" in row for row in rows)
    cells = f"{len(rows)}" + (f", {failed} diverged" if failed else "")
    size = f"{fmean(sizes):,.0f} kB" if sizes else "–"
    return [_mean(steps, 0), _mean(seconds, 2), _mean(trained, 0), size, cells]


def _mean(values: Sequence[float], digits: int) -> str:
    return f"{fmean(values):.{digits}f}" if values else "–"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
