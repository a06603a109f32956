"""How a mix of adapters becomes the two flat vectors that an engine reads, and where each layer's values lie there."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hueshift.adapters.adapter import Adapter, LowRankFactors
from hueshift.adapters.blocks import BlockWeights, Weight, layer_weight
from hueshift.adapters.errors import FailedPrecondition, InvalidArgument, Reason
from hueshift.adapters.layout import BaseLayout, MatrixLayer
from hueshift.engines.interface import EngineRow
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text_side import is_text_side

Mix = Sequence[tuple[Adapter, Weight]]


@dataclass(frozen=True, slots=True)
class LowRankTarget:
    """A layer with a low-rank branch of at most `rank`, and its place in a low-rank row.

    The row holds A [rank, cols] from `begin`, then B [rows, rank]; ranks that a mix does not use are zeros.
    """

    name: str
    rows: int
    cols: int
    rank: int
    begin: int

    @property
    def sizes(self) -> tuple[int, int]:
        """Values of A and of B."""
        return self.rank * self.cols, self.rows * self.rank

    @property
    def end(self) -> int:
        """Where the next target begins."""
        return self.begin + sum(self.sizes)


@dataclass(frozen=True)
class RowLayout:
    """The layout of engine rows: spectral rows as in `layout`, and one low-rank branch for each layer that
    `lowrank_targets` names.

    A target is a layer name or its ending (`proj_out`, `attn2.to_k`); it must fit linear layers or 1x1 convolutions
    only, because the branch acts on each position alone. The rank of a branch is at most
    min(lowrank_rank, rows, cols). Raises InvalidArgument (SETTINGS_INVALID) on a target that fits nothing or something
    else, or a rank below 1.

    Without `text_side` the layers that make cross-attention keys and values have no branch and do not count: engines
    read those as an input (engines/cross_attention.py), where an adapter's rank is not limited either.
    """

    layout: BaseLayout
    lowrank_targets: tuple[str, ...]
    lowrank_rank: int
    text_side: bool = True
    targets: tuple[LowRankTarget, ...] = field(init=False)
    lowrank_size: int = field(init=False)
    _sizes: dict[str, int] = field(init=False, repr=False, compare=False)
    _shapes: dict[str, tuple[int, int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Find the target layers and lay them out in module order."""
        if self.lowrank_rank < 1:
            raise InvalidArgument.for_field(
                "engine.lowrank_rank", f"{self.lowrank_rank} is below 1", Reason.SETTINGS_INVALID
            )
        wanted = {name for ending in self.lowrank_targets for name in _fitting(self.layout, ending)}
        targets: list[LowRankTarget] = []
        position = 0
        for layer in self.layout.matrices:
            if layer.name in wanted and (self.text_side or not is_text_side(layer.name)):
                rank = min(self.lowrank_rank, layer.rank)
                targets.append(LowRankTarget(layer.name, layer.rows, layer.cols, rank, position))
                position = targets[-1].end
        object.__setattr__(self, "targets", tuple(targets))
        object.__setattr__(self, "lowrank_size", position)
        # Asked of the layout's layers for every mix, these would take longer than the sums.
        object.__setattr__(self, "_sizes", {name: end - begin for name, begin, end in self.layout.spans()})
        object.__setattr__(self, "_shapes", {layer.name: (layer.rows, layer.cols) for layer in self.layout.matrices})

    @property
    def spectral_size(self) -> int:
        """Values of a spectral row."""
        return self.layout.spectral_size

    @property
    def served_ranks(self) -> dict[str, int]:
        """The largest rank that an engine serves, by layer: that of a branch, or any rank on the text side."""
        ranks = {layer.name: layer.rank for layer in self.layout.matrices if is_text_side(layer.name)}
        return ranks | {target.name: target.rank for target in self.targets}

    def base_spectral(self, factors: SpectralFactors, norms: Mapping[str, Tensor]) -> Tensor:
        """The base model's own spectral row [spectral_size]: sigma of each matrix, then the weights of each norm."""
        parts = [factors.sigma[layer.name] for layer in self.layout.matrices]
        parts += [norms[layer.name].float().cpu() for layer in self.layout.norms]
        return torch.cat(parts)

    def pack_lowrank(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """Lay out A [k, cols] and B [rows, k] of each named target, k at most its rank, as one row [lowrank_size].

        Unused ranks and absent targets are zeros. Differentiable with respect to the factors.
        Raises InvalidArgument (ADAPTER_TARGET_UNSUPPORTED, ADAPTER_RANK_TOO_LARGE, ADAPTER_SHAPE_MISMATCH).
        """
        known = {target.name for target in self.targets}
        for name in factors:
            if name not in known:
                raise InvalidArgument(
                    Reason.ADAPTER_TARGET_UNSUPPORTED,
                    f"this engine has no low-rank branch on {name}; it has them on layers ending in "
                    f"{', '.join(self.lowrank_targets) or '(none)'} (setting engine.lowrank_targets)",
                    metadata={"layer": name},
                )
        parts = [part for target in self.targets for part in _padded(target, factors.get(target.name))]
        return torch.cat(parts) if parts else torch.zeros(0)

    def compose(self, mix: Mix, factors: SpectralFactors, norms: Mapping[str, Tensor]) -> EngineRow:
        """Make one engine row of several weighted adapters of the same base model.

        Spectral: relu(sigma + sum_k w_k delta_k), and w + sum_k w_k shift_k for norms (Han et al. 2023, sections 3.2
        and 3.4), where w_k may differ by block. Low rank: ranks are concatenated, and w_k times the adapter's scale is
        folded into B. Dense: sum_k w_k delta_k. A part that no adapter touches is None, so that such a row also runs
        under the dense plan.
        `norms` are the base's norm weights.

        Raises FailedPrecondition (ADAPTER_BASE_MISMATCH), or InvalidArgument (ADAPTER_TENSOR_UNKNOWN,
        ADAPTER_SHAPE_MISMATCH, ADAPTER_TARGET_UNSUPPORTED, ADAPTER_RANK_TOO_LARGE, INVALID_FIELD for a weight that is
        not finite).
        """
        for adapter, weight in mix:
            self._check(adapter, weight)
        spectral = any(adapter.norm or any(map(self._counts, adapter.spectral)) for adapter, _ in mix)
        lowrank = any(any(map(self._counts, adapter.lowrank)) for adapter, _ in mix)
        return EngineRow(
            spectral=self._compose_spectral(mix, factors, norms) if spectral else None,
            lowrank=self._compose_lowrank(mix) if lowrank else None,
            dense=self._compose_dense(mix) if any(adapter.dense for adapter, _ in mix) else None,
        )

    def _check(self, adapter: Adapter, weight: Weight) -> None:
        if adapter.base_hash != self.layout.base_hash:
            raise FailedPrecondition(
                Reason.ADAPTER_BASE_MISMATCH,
                f"the adapter belongs to base model {adapter.base_hash[:12]}, but this engine runs "
                f"{self.layout.base_hash[:12]}; fine-tune it again on this base",
            )
        for value in [value for _, value in weight.entries] if isinstance(weight, BlockWeights) else [weight]:
            if not math.isfinite(value):
                raise InvalidArgument.for_field("weight", f"{value} is not finite; give a finite number")

    def _compose_spectral(self, mix: Mix, factors: SpectralFactors, norms: Mapping[str, Tensor]) -> Tensor:
        row = self.base_spectral(factors, norms)
        layout, sizes = self.layout, self._sizes
        places = dict(zip(sizes, torch.split(row, list(sizes.values())), strict=True))
        for adapter, weight in mix:
            for shifts, offsets in (
                (adapter.spectral, layout.matrix_offsets),
                (adapter.norm, layout.norm_offsets),
            ):
                for name, shift in shifts.items():
                    _check_shift(name, shift, sizes if name in offsets else {})
                    places[name] += layer_weight(weight, name) * shift.float()
        row[: layout.sigma_size].clamp_(min=0)
        return row

    def _compose_dense(self, mix: Mix) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for adapter, weight in mix:
            for name, delta in adapter.dense.items():
                self._check_delta(name, delta)
                strength = layer_weight(weight, name)
                if strength == 0:
                    continue
                # An adapter alone at full weight is 1.7 GB for SD1.5 that need not be copied.
                part = delta if strength == 1 else (delta.float() * strength).to(delta.dtype)
                before = found.get(name)
                found[name] = part if before is None else (before.float() + part.float()).to(part.dtype)
        return found

    def _check_delta(self, name: str, delta: Tensor) -> None:
        shape = self._shapes.get(name)
        if shape is None or is_text_side(name):
            raise InvalidArgument(
                Reason.ADAPTER_TENSOR_UNKNOWN, f"the base model has no matrix {name!r} that takes a whole delta"
            )
        if tuple(delta.shape) != shape:
            raise InvalidArgument(
                Reason.ADAPTER_SHAPE_MISMATCH, f"{name}: a delta of shape {tuple(delta.shape)}, expected {shape}"
            )

    def _counts(self, layer: str) -> bool:
        return self.text_side or not is_text_side(layer)

    def _compose_lowrank(self, mix: Mix) -> Tensor:
        stacked: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        for adapter, weight in mix:
            for name, parts in adapter.lowrank.items():
                strength = layer_weight(weight, name)
                # What has no strength takes no rank: two adapters of full rank can share a row, block by block.
                if strength == 0 or not self._counts(name):
                    continue
                a, b = stacked.setdefault(name, ([], []))
                a.append(parts.a.float())
                b.append(_folded(parts, strength))
        return self.pack_lowrank({name: (_joined(a, 0), _joined(b, 1)) for name, (a, b) in stacked.items()})


def read_norms(layout: BaseLayout, weight_of: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Weights of every norm of the base model by layer name, fp32 on the CPU."""
    return {layer.name: weight_of(layer.name).detach().float().cpu() for layer in layout.norms}


def _fitting(layout: BaseLayout, ending: str) -> list[str]:
    fitting = [layer for layer in layout.matrices if layer.name == ending or layer.name.endswith(f".{ending}")]
    wrong = [layer.name for layer in fitting if not layer.is_pointwise]
    if wrong or not fitting:
        problem = f"fits {wrong[0]}, a convolution wider than 1x1" if wrong else "fits no layer of this base model"
        raise InvalidArgument.for_field(
            "engine.lowrank_targets",
            f"{ending!r} {problem}; allowed are endings of linear and 1x1 layers, for example "
            f"{', '.join(_endings(layout.matrices)[:8])}",
            Reason.SETTINGS_INVALID,
        )
    return [layer.name for layer in fitting]


def _endings(matrices: Sequence[MatrixLayer]) -> list[str]:
    pointwise = [layer.name for layer in matrices if layer.is_pointwise and "attentions" in layer.name]
    return sorted({name.rpartition(".")[2] for name in pointwise if not name[-1].isdigit()})


def _padded(target: LowRankTarget, factors: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    if factors is None:
        size_a, size_b = target.sizes
        return torch.zeros(size_a), torch.zeros(size_b)
    a, b = factors
    rank = a.shape[0]
    if tuple(a.shape) != (rank, target.cols) or tuple(b.shape) != (target.rows, rank):
        raise InvalidArgument(
            Reason.ADAPTER_SHAPE_MISMATCH,
            f"{target.name}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit; they must be (rank, {target.cols}) "
            f"and ({target.rows}, rank)",
        )
    if rank > target.rank:
        raise InvalidArgument(
            Reason.ADAPTER_RANK_TOO_LARGE,
            f"{target.name}: the adapters have rank {rank} together, at most {target.rank} fits; use fewer or smaller "
            "adapters, or raise the setting engine.lowrank_rank",
            metadata={"layer": target.name, "rank": str(rank), "max_rank": str(target.rank)},
        )
    spare = target.rank - rank
    if spare:
        pad = torch.nn.functional.pad
        a, b = pad(a, (0, 0, 0, spare)), pad(b, (0, spare))
    return a.flatten(), b.flatten()


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    # Most mixes are of one adapter, and its factors are megabytes that would be copied once more.
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _folded(parts: LowRankFactors, weight: float) -> Tensor:
    return parts.b.float() * (weight * parts.scale)


def _check_shift(name: str, shift: Tensor, sizes: Mapping[str, int]) -> None:
    if name not in sizes:
        raise InvalidArgument(Reason.ADAPTER_TENSOR_UNKNOWN, f"the base model has no adaptable layer {name!r}")
    if tuple(shift.shape) != (sizes[name],):
        raise InvalidArgument(
            Reason.ADAPTER_SHAPE_MISMATCH, f"{name}: shifts of shape {tuple(shift.shape)}, expected ({sizes[name]},)"
        )
