"""Low-rank branches in training: what residuals and LoRA share."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hueshift.adapters.adapter import Adapter, AdapterKind, LowRankFactors
from hueshift.engines.interface import Plan
from hueshift.engines.rows import LowRankTarget, RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.training.methods.learnable import Constant, Learned, Rows, Values
from hueshift.training.spec import Method

Factors = tuple[Tensor, Tensor]


class Branches:
    """y = Wx + scale B(Ax) on every target of `layout`, with the ranks of `ranks` by layer.

    A starts Gaussian with variance 1/cols, so that |Ax| is about |x| whatever the rank, and B at zero (Hu et al. 2021),
    so that step 0 is the base. With `principal` they start at the base's strongest singular triples instead, which are
    taken off again (`pissa`).
    """

    plan = Plan.DENSE

    def __init__(
        self,
        method: Method,
        layout: RowLayout,
        ranks: Mapping[str, int],
        learning_rate: float,
        *,
        scale: float = 1.0,
        principal: Mapping[str, Factors] | None = None,
    ) -> None:
        self.layout = layout
        self.ranks = ranks
        self._method, self._learning_rate, self._scale = method, learning_rate, scale
        self._principal = principal or {}
        self._lay_out()

    def initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        """`a/<layer>` [rank, cols] and `b/<layer>` [rows, rank]."""
        values: dict[str, Tensor] = {}
        for target in self.layout.targets:
            rank = self.ranks[target.name]
            if target.name in self._principal:
                a, b = self._principal[target.name]
            else:
                a = torch.randn(rank, target.cols, generator=generator) / math.sqrt(target.cols)
                b = torch.zeros(target.rows, rank)
            values[f"a/{target.name}"], values[f"b/{target.name}"] = a, b
        return values

    def learning_rate(self, name: str) -> float:
        """One for all."""
        return self._learning_rate

    def rows(self, values: Values) -> Rows:
        """A and B of every target, padded to the layout's ranks, the scale in B.

        A few launches however many layers there are: all values one after the other, scaled, put in their places.
        """
        flat = torch.cat([values[name].flatten() for target in self.layout.targets for name in _names(target)])
        device = flat.device
        if self._scale != 1:
            flat = flat * self._scales.on(device)
        if self._places is not None:
            flat = self._start.on(device).index_copy(0, self._places.on(device), flat)
        return Rows(lowrank=flat[None])

    def base_rows(self) -> Rows:
        """No branch at all."""
        return Rows()

    def adapter(self, values: Values) -> Learned:
        """Take the factors as they are."""
        adapter = Adapter(
            kind=AdapterKind.LOWRANK,
            base_hash=self.layout.layout.base_hash,
            method=self._method,
            lowrank={
                name: LowRankFactors(a.detach().to("cpu", copy=True), b.detach().to("cpu", copy=True), self._scale)
                for name, (a, b) in self._changes(values).items()
            },
        )
        return Learned(adapter)

    def _lay_out(self) -> None:
        """Find where the values, one after the other, lie in a row, and what lies between them."""
        targets = self.layout.targets
        sizes = [size for t in targets for size in (self.ranks[t.name] * t.cols, t.rows * self.ranks[t.name])]
        scales = [torch.full((size,), (1.0, self._scale)[number % 2]) for number, size in enumerate(sizes)]
        self._scales = Constant(torch.cat(scales) if scales else torch.zeros(0))
        zeros = {
            name: torch.zeros(shape)
            for t in targets
            for name, shape in zip(_names(t), ((self.ranks[t.name], t.cols), (t.rows, self.ranks[t.name])), strict=True)
        }
        start = {name: (a, b * self._scale) for name, (a, b) in self._changes(zeros).items()}
        self._start = Constant(self.layout.pack_lowrank(start))
        # Numbers from 1 on stand for the values; what is left at 0 is none of theirs.
        numbers = iter(torch.split(torch.arange(1, sum(sizes) + 1), sizes))
        marks = self.layout.pack_lowrank(
            {t.name: (next(numbers).view(-1, t.cols), next(numbers).view(t.rows, -1)) for t in targets}
        )
        found = marks.nonzero().flatten()
        places = torch.empty_like(found)
        places[marks[found].long() - 1] = found
        whole = len(found) == len(marks) and bool((places == torch.arange(len(places))).all())
        self._places = None if whole else Constant(places)

    def _changes(self, values: Values) -> dict[str, Factors]:
        """Factors of the change from the pristine base: what is learned, less what it started from."""
        changes: dict[str, Factors] = {}
        for target in self.layout.targets:
            a, b = values[f"a/{target.name}"], values[f"b/{target.name}"]
            if target.name in self._principal:
                first_a, first_b = (part.to(a.device) for part in self._principal[target.name])
                a, b = torch.cat([a, first_a]), torch.cat([b, -first_b], 1)
            changes[target.name] = (a, b)
        return changes


def _names(target: LowRankTarget) -> tuple[str, str]:
    return f"a/{target.name}", f"b/{target.name}"


def pissa(factors: SpectralFactors, ranks: Mapping[str, int], scale: float) -> dict[str, Factors]:
    """A = sqrt(S_r / scale) V_r^T and B = U_r sqrt(S_r / scale) of each layer (PiSSA, Meng et al. 2024, section 3).

    `scale` B A is then the best approximation of rank r of the base's matrix; the base stays as it is, so the change is
    scale (B A - B_0 A_0), of rank 2r.
    """
    found: dict[str, Factors] = {}
    for name, rank in ranks.items():
        root = (factors.sigma[name][:rank] / scale).sqrt()
        found[name] = (root[:, None] * factors.vh[name][:rank], factors.u[name][:, :rank] * root)
    return found
