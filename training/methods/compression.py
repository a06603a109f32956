"""Learned matrices as products of a rank that can be served, and how much of what was learned they keep."""

from collections.abc import Mapping

import structlog
from torch import Tensor

from hueshift.adapters.adapter import LowRankFactors
from hueshift.adapters.formats.compress import compress

_log = structlog.get_logger()


def compress_deltas(deltas: Mapping[str, Tensor], rank: int) -> tuple[dict[str, LowRankFactors], float]:
    """Bring each delta [rows, cols] to `rank` by truncated SVD.

    Returns the factors of all layers that changed, and the share of energy (squared Frobenius norm over all layers)
    that they keep, 0 to 1; 1 if nothing had changed.
    """
    factors: dict[str, LowRankFactors] = {}
    energy = lost = 0.0
    for name, delta in deltas.items():
        if not bool(delta.any()):
            continue
        product = compress(delta.cpu(), rank)
        factors[name] = LowRankFactors(product.a, product.b)
        energy += product.norm**2
        lost += product.residual**2
    kept = 1 - lost / energy if energy else 1.0
    _log.info("training.compressed", rank=rank, layers=len(factors), kept_energy=round(kept, 4))
    return factors, kept
