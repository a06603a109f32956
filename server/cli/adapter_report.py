"""The report of an import, for people."""

import math
from collections import Counter
from typing import TYPE_CHECKING

from hueshift.server.cli.output import facts_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from hueshift.client.conversion import ImportReport


def report_table(report: "ImportReport") -> "Table":
    """Return what was converted, how exactly, and what was not."""
    forms = Counter(layer.form for layer in report.layers)
    ranks = Counter(layer.rank for layer in report.layers if layer.rank)
    worst = max(report.layers, key=lambda layer: layer.error, default=None)
    exact = worst is None or worst.error < _ROUNDING
    return facts_table(
        {
            "converted from": report.format,
            "layers": ", ".join(f"{count} {form}" for form, count in sorted(forms.items())),
            "ranks": ranks_text(ranks),
            "words": ", ".join(report.words),
            "error": "none"
            if exact
            else f"{report.error:.2%} of the change; {report.kept_energy:.2%} of its energy kept",
            "worst layer": "" if exact or worst is None else f"{worst.layer} ({worst.error:.2%})",
            "left out": "\n".join(
                f"{part.count} tensors: {part.reason} ({part.keys[0]}{', ...' if part.count > 1 else ''})"
                for part in report.left_out
            ),
            "notes": "\n".join(report.notes),
        }
    )


# Relative errors below this are fp32 rounding.
_ROUNDING = 1e-6


def ranks_text(ranks: "Counter[int] | dict[int, int]") -> str:
    """Return ranks with how many layers have each."""
    return ", ".join(f"{rank} ({count} layers)" for rank, count in sorted(ranks.items()))


def norms_text(norms: "Mapping[str, float]") -> str:
    """Return by kind of part how many there are, their smallest and largest norm, and which one is the strongest."""
    groups: dict[str, dict[str, float]] = {}
    for name, norm in norms.items():
        group, _, part = name.partition("/")
        groups.setdefault(group, {})[part] = norm
    lines: list[str] = []
    for group, parts in groups.items():
        strongest = max(parts, key=lambda part: parts[part])
        total = math.sqrt(math.fsum(norm**2 for norm in parts.values()))
        lines.append(
            f"{group}: {len(parts)} from {min(parts.values()):.3g} to {parts[strongest]:.3g} ({strongest}), "
            f"{total:.3g} in all"
        )
    return "\n".join(lines)
