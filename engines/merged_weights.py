"""Writes the weights of one adapter row: W' = U diag(sigma') V^T + B A into memory that never moves.

Always all adapted weights, always from the pristine base: writing only what an adapter changes would leave traces of
the one before. Shared by the engines that hold merged weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hueshift.adapters.layout import BaseLayout, MatrixLayer
from hueshift.engines.interface import EngineRow
from hueshift.engines.rows import LowRankTarget, RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.kernels.lowrank_merge import LowRankFactors, MergeLayer, lowrank_merge, mix_adapters, plan_merge
from hueshift.kernels.spectral_plan import SpectralLayer, SpectralPlan, plan_spectral, share_plan
from hueshift.kernels.spectral_reassemble import spectral_reassemble


@dataclass(frozen=True, slots=True)
class WrittenMatrix:
    """One matrix to be written. `is_transposed` weights are held as [cols, rows], their two factors exchanged."""

    name: str
    layer: SpectralLayer
    is_transposed: bool = False


def written_matrix(
    matrix: MatrixLayer, layout: BaseLayout, factors: SpectralFactors | None, base: Tensor, out: Tensor
) -> WrittenMatrix:
    """The matrix that is written to `out`, from its pristine `base`; without `factors`, for a writer that shares
    another's, their places are hollow.
    """
    if factors is None:
        u, vh = hollow(out, matrix.rows, matrix.rank), hollow(out, matrix.rank, matrix.cols)
        sigma = torch.zeros(matrix.rank, device=out.device)
    else:
        u, vh = (part[matrix.name].to(out.device, out.dtype).contiguous() for part in (factors.u, factors.vh))
        sigma = factors.sigma[matrix.name].to(out.device)
    offset = layout.matrix_offsets[matrix.name]
    return WrittenMatrix(matrix.name, SpectralLayer(u, sigma, vh, base, out, offset))


@dataclass(frozen=True, slots=True)
class _Branch:
    """The place of one target's A and B in a row, and the buffers that the kernel reads."""

    target: LowRankTarget
    a: Tensor
    b: Tensor
    is_transposed: bool


class WeightWriter:
    """Writes rows into the `out` tensors of `matrices` and into `norms`, weights [size] by layer.

    Branches of layers that are not among them are left out. `like` shares its packed singular vectors (SD1.5: 2.2 GB in
    fp16): its matrices must be the same ones with other `out` tensors, and both must write on one stream.
    """

    def __init__(
        self,
        layout: BaseLayout,
        rows: RowLayout,
        matrices: Sequence[WrittenMatrix],
        norms: Mapping[str, Tensor],
        like: "WeightWriter | None" = None,
    ) -> None:
        layers = [matrix.layer for matrix in matrices]
        device, dtype = layers[0].base.device, layers[0].base.dtype
        self._norms = [(out, layout.norm_offsets[name]) for name, out in norms.items()]
        self._plan: SpectralPlan = (
            _packed_alone(plan_spectral(layers))
            if like is None
            else share_plan(like._plan, [layer.out for layer in layers])
        )
        if like is None:
            self._row = torch.zeros(1, rows.spectral_size, device=device)
            self._lowrank = torch.zeros(rows.lowrank_size, device=device)
            self._one = torch.ones(1, device=device)
        else:
            self._row, self._lowrank, self._one = like._row, like._lowrank, like._one
        places = {matrix.name: matrix for matrix in matrices}
        # Not the matrices: they hold the singular vectors that were packed.
        self._outs = {name: (matrix.layer.out, matrix.is_transposed) for name, matrix in places.items()}
        self._branches = [
            _make_branch(target, places[target.name].is_transposed, device, dtype)
            for target in rows.targets
            if target.name in places
        ]
        self._merge = None
        if self._branches:
            # Onto what the reassembly has just written, so base and out are one tensor.
            outs = [places[branch.target.name].layer.out for branch in self._branches]
            self._merge = plan_merge([MergeLayer(out, out) for out in outs], in_place=True)
            parts = {number: LowRankFactors(b.a, b.b) for number, b in enumerate(self._branches)}
            self._mix = mix_adapters(self._merge, [parts])

    def write(self, row: EngineRow) -> None:
        """Queue W' of a row that has both parts, on the current stream. The base's own row gives the base's bits."""
        self.take(row)
        self.launch()

    def take(self, row: EngineRow) -> None:
        """Copy a row that has both parts to where `launch` reads it. Raises ValueError if it has not."""
        if row.spectral is None or row.lowrank is None:
            raise ValueError("a merge takes both parts of a row, as the slabs hold them")
        self._row[0].copy_(row.spectral, non_blocking=True)
        self._lowrank.copy_(row.lowrank, non_blocking=True)

    def add(self, deltas: Mapping[str, Tensor]) -> None:
        """Queue the sum of whole deltas [rows, cols] by layer onto what `launch` wrote; in fp32, rounded once more.

        Beside the weights it takes the memory of one delta, for the largest layer of SD1.5 59 MB; copies of both in
        fp32 would be 350 MB more, which the stream's cache then keeps from all others. Raises KeyError on a layer that
        is not written.
        """
        for name, delta in deltas.items():
            out, is_transposed = self._outs[name]
            change = delta.to(out.device, non_blocking=True)
            # Sums of halves are fp32 inside, and so are those with what is wider.
            out.add_((change.t() if is_transposed else change).reshape(out.shape))

    def launch(self) -> None:
        """Queue W' of the row that was taken. Allocates nothing, so it can be captured in a graph and replayed."""
        spectral_reassemble(self._plan, self._row, self._one, effective=True)
        for out, begin in self._norms:
            out.copy_(self._row[0, begin : begin + out.numel()])
        if self._merge is not None:
            for branch in self._branches:
                _fill(branch, self._lowrank)
            lowrank_merge(self._merge, self._mix, self._one)


def hollow(like: Tensor, rows: int, cols: int) -> Tensor:
    """A matrix [rows, cols] of one number's memory, where only shape, dtype and device of one are looked at."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(rows, cols)


def _packed_alone(plan: SpectralPlan) -> SpectralPlan:
    """Let go of the singular vectors that a GPU's plan was packed from: its kernels read the packed ones alone, and
    SD1.5's are another 2.2 GB, SDXL's 7.3 GB."""
    if plan.tables is None:
        return plan
    layers = [replace(x, u=hollow(x.u, *x.u.shape), vh=hollow(x.vh, *x.vh.shape)) for x in plan.layers]
    return replace(plan, layers=tuple(layers))


def _make_branch(target: LowRankTarget, is_transposed: bool, device: torch.device, dtype: torch.dtype) -> _Branch:
    rows, cols = (target.cols, target.rows) if is_transposed else (target.rows, target.cols)
    a = torch.zeros(target.rank, cols, dtype=dtype, device=device)
    b = torch.zeros(rows, target.rank, dtype=dtype, device=device)
    return _Branch(target, a, b, is_transposed)


def _fill(branch: _Branch, lowrank: Tensor) -> None:
    target = branch.target
    size_a, _ = target.sizes
    a = lowrank[target.begin : target.begin + size_a].view(target.rank, target.cols)
    b = lowrank[target.begin + size_a : target.end].view(target.rows, target.rank)
    branch.a.copy_(b.T if branch.is_transposed else a, non_blocking=True)
    branch.b.copy_(a.T if branch.is_transposed else b, non_blocking=True)
