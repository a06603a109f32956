"""What a comparison leaves behind: report.md and report.json with its tables, and a grid for each case and budget."""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from hueshift.training.evaluation.comparison import headings
from hueshift.training.evaluation.grids import GridRow, draw_grid
from hueshift.training.evaluation.matrix import REAL, Matrix, list_cells
from hueshift.training.evaluation.plan import Budget, CasePlan
from hueshift.training.evaluation.tables import missing_words, report


def draw_case(matrix: Matrix, case: CasePlan, budget: Budget, columns: int) -> Image.Image | None:
    """Grid of a case's finished cells under a budget, the first seed's, at most `columns` wide; None without any."""
    found = {row["cell"]: row for row in matrix.results()}
    cells = [
        cell
        for cell in list_cells(matrix.plan)
        if cell.case == case and cell.name in found and cell.budget in (None, budget)
    ]
    cells = [cell for cell in cells if cell.budget is None or cell.seed == matrix.plan.seeds[0]]
    if not any(cell.budget == budget for cell in cells):
        return None
    rows: list[GridRow] = []
    for cell in cells:
        measures = found[cell.name].get("measures", {})
        note = f"truth {measures['truth']:.2f}" if "truth" in measures else ""
        label = "learned from" if cell.method == REAL else cell.method
        rows.append(GridRow(label, matrix.strip(cell)[:columns], note))
    return draw_grid(rows, headings(matrix.questions(case))[:columns])


def grid_name(case: str, budget: str) -> str:
    """File name of a grid."""
    return f"methods-{case}-{budget.replace(' ', '-')}.png"


def write_grids(matrix: Matrix, folder: Path, columns: int) -> list[Path]:
    """Write the grid of every case and budget that has cells; return their paths."""
    paths: list[Path] = []
    for case in matrix.plan.cases:
        for budget in matrix.plan.budgets:
            grid = draw_case(matrix, case, budget, columns)
            if grid is not None:
                paths.append(folder / grid_name(case.name, budget.name))
                grid.save(paths[-1], optimize=True)
    return paths


def write_matrix_report(matrix: Matrix, title: str) -> Sequence[Path]:
    """Write everything to the comparison's folder, and return the paths, report.md first."""
    rows = matrix.results()
    matrix.out.mkdir(parents=True, exist_ok=True)
    grids = write_grids(matrix, matrix.out, 12)
    page = "\n".join([report(rows, title), *(f"![{path.stem}]({path.name})\n" for path in grids)])
    contents = {"report.md": page, "report.json": json.dumps({"rows": rows, "missing": missing_words(rows)}, indent=2)}
    for name, content in contents.items():
        (matrix.out / name).write_text(content, encoding="utf-8")
    return [*(matrix.out / name for name in contents), *grids]
