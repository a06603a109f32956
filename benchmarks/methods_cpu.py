"""Compare all fine-tuning methods at equal steps and at equal time, and write docs/methods.md from the rows.

    python -P benchmarks/methods_cpu.py --data ../shared/data --max-minutes 30   # until nothing is left
    python -P benchmarks/methods_cpu.py --report   # only tables and pictures, from the rows
    python -P benchmarks/methods_cpu.py --check    # is the page the one the rows give?

The plan is benchmarks/methods_cpu.toml: four subjects and the OpenMoji style, which the embedded model has never seen.
Rows go to benchmarks/results/methods_cpu.jsonl; adapters, checkpoints and pictures stay in the folder of --out, so that
a stopped run loses at most a few training steps, and a finished cell is not done again. Where the data folder is absent
it says so and does nothing.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hueshift.engines.base_model import load_base_model
from hueshift.models.embedded import EMBEDDED_CLIP, EMBEDDED_MODEL
from hueshift.training.evaluation.drawing import make_painter
from hueshift.training.evaluation.encoders import load_dino
from hueshift.training.evaluation.matrix import Matrix, list_cells
from hueshift.training.evaluation.matrix_report import grid_name, write_grids
from hueshift.training.evaluation.plan import Plan, read_plan
from hueshift.training.evaluation.protocol import Judges
from hueshift.training.evaluation.rows import read_rows
from hueshift.training.evaluation.tables import case_table, missing_words, summary_table
from hueshift.training.scores import ClipScorer

PROJECT = Path(__file__).resolve().parent.parent
PLAN = Path(__file__).with_suffix(".toml")
ROWS = PROJECT / "benchmarks" / "results" / "methods_cpu.jsonl"
PAGE = PROJECT / "docs" / "methods.md"
# Pictures of a case in a row of its grid: prompts first, then truths.
_COLUMNS = 8


def render(text: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return the page with its generated parts made anew from the rows."""
    for name, lines in sections(rows).items():
        begin, end = f"<!-- results: {name} -->", f"<!-- end: {name} -->"
        before, mark, rest = text.partition(begin)
        _, other, after = rest.partition(end)
        if not mark or not other:
            raise ValueError(f"docs/methods.md has no marks {begin} and {end}")
        text = "\n".join([f"{before}{begin}", *lines, f"{end}{after}"])
    return text


def sections(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Lines of every generated part, by its name."""
    if not rows:
        return {name: ["Not yet measured."] for name in ("where", "summary", "pictures", "cells")}
    where = sorted({(row["machine"], row["threads"], f"torch {row['torch']}", row["date"]) for row in rows})
    told = [f"Measured on: {'; '.join(', '.join(map(str, one)) for one in where)} (threads after the machine)."]
    summary: list[str] = []
    for budget in dict.fromkeys(row["budget"] for row in rows if row["budget"] is not None):
        for style, what in ((False, "Subjects"), (True, "Style")):
            summary += ["", f"**{what}, {budget}**", "", *summary_table(rows, budget, style=style)]
    pictures: list[str] = []
    for case, budget in dict.fromkeys((row["case"], row["budget"]) for row in rows if row["budget"] is not None):
        pictures += ["", f"{case}, {budget}:", "", f"![{case}, {budget}]({grid_name(case, budget)})"]
    table = ["", *case_table(rows)]
    return {"where": [*told, missing_words(rows)], "summary": summary, "pictures": pictures, "cells": table}


def _open(plan: Plan, options: argparse.Namespace, progress: Progress, console: Console) -> Matrix:
    base = load_base_model(EMBEDDED_MODEL)
    painter = make_painter(base, options.cache, steps=plan.sampler_steps, guidance=plan.guidance)
    dino, words = load_dino(options.dino)
    if words:
        console.print(words)
    tasks: dict[str, Any] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = progress.add_task(what, total=total)
        progress.update(tasks[what], completed=done, total=total, visible=done < total)

    judges = Judges(ClipScorer(EMBEDDED_CLIP), dino)
    return Matrix(plan, options.data, options.out, painter=painter, judges=judges, rows=ROWS, progress=report)


def _measure(options: argparse.Namespace, console: Console) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    plan = read_plan(options.plan)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        matrix = _open(plan, options, progress, console)
        if not options.report:
            console.print(f"{len(matrix.missing())} of {len(list_cells(plan))} cells to do")
            for row in matrix.run(None if options.max_minutes is None else 60 * options.max_minutes):
                console.print(f"{row['cell']}: {json.dumps(row.get('measures', row.get('error')))}, {row['seconds']} s")
        grids = write_grids(matrix, PAGE.parent, _COLUMNS)
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), read_rows(ROWS)), encoding="utf-8")
    left = len(matrix.missing())
    console.print(
        f"wrote {PAGE.name} and {len(grids)} grids; {left} cells are left" + (": run it again" if left else "")
    )


def main() -> int:
    """Run what is missing, or write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=PROJECT.parent / "shared" / "data", help="folder of the pictures")
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--out", type=Path, default=Path("out/methods"))
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/hueshift").expanduser())
    parser.add_argument("--dino", type=Path, help="folder of a ViT-S/16 of DINO, as transformers loads it")
    parser.add_argument("--max-minutes", type=float, help="begin no cell that would end later")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--report", action="store_true", help="only write the page and its pictures")
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    options = parser.parse_args()
    if options.check:
        text = PAGE.read_text(encoding="utf-8")
        same = render(text, read_rows(ROWS)) == text
        print("docs/methods.md is up to date" if same else "docs/methods.md is old: run it with --report")
        return 0 if same else 1
    if not options.data.is_dir():
        print(f"skipped: there is no data folder {options.data}; give one with --data")
        return 0
    _measure(options, Console(stderr=True, highlight=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
