"""Personalized Residuals (Ham et al. 2024): B A added to the output projection of each transformer block.

The paper does not say how the factors start; `Branches` does.
"""

import math

from hueshift.adapters.layout import BaseLayout
from hueshift.engines.rows import RowLayout
from hueshift.training.methods.branches import Branches
from hueshift.training.spec import Method, TrainingSpec

# The output projection of each transformer block, with rank max(1, 0.05 m) for m output features (section 3.1).
RESIDUAL_TARGET = "proj_out"
RESIDUAL_RANK_SHARE = 0.05


def make_residuals(layout: BaseLayout, spec: TrainingSpec) -> Branches:
    """Make the residuals of a base."""
    widest = max((m.rows for m in layout.matrices if m.name.endswith(f".{RESIDUAL_TARGET}")), default=1)
    rows = RowLayout(layout, (RESIDUAL_TARGET,), residual_rank(widest, widest))
    ranks = {target.name: residual_rank(target.rows, target.cols) for target in rows.targets}
    return Branches(Method.RESIDUALS, rows, ranks, spec.learning_rate)


def residual_rank(rows: int, cols: int) -> int:
    """Rank of the residual on a `rows` x `cols` matrix."""
    return max(1, min(math.floor(RESIDUAL_RANK_SHARE * rows), cols))
