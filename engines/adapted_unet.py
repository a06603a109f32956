"""A copy of the base UNet whose layers read adapter rows. It shares the base's weights and never changes them."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.engines.adapted_layers import (
    BranchedConv,
    BranchedLinear,
    CallRows,
    CrossSlice,
    FactoredConv,
    FactoredLinear,
    RowGroupNorm,
    RowLayerNorm,
    split_branches,
    split_rows,
)
from hueshift.engines.added_embedding import added_width
from hueshift.engines.base_model import BaseModel
from hueshift.engines.cross_attention import CrossLayout
from hueshift.engines.guided_attention import CallGuides, ConfiningCrossAttention, SharedSelfAttention
from hueshift.engines.interface import Guides, Plan
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors


class AdaptedUNet(nn.Module):
    """The UNet of `base` under one plan.

    DENSE keeps the weights and adds the low-rank branch on the targets of `rows`. FACTORED also replaces every matrix
    by its factors and every norm's weights by the row's. FULL is FACTORED with LAG masks and shared self-attention.
    Cross-attention reads `cross` in the place of `context`, unless `rows` count the text side: then it computes keys
    and values itself, with the rows' shifts and branches, as training needs; in SDXL the same holds for
    `add_embedding`, in whose place the UNet reads `added`. With `channels_last` convolution weights
    are held in that layout (a copy of them unless the base has it already), which torch runs faster.

    A call fills a scope that all layers read, so one instance serves one thread at a time.
    """

    def __init__(
        self, base: BaseModel, factors: SpectralFactors, rows: RowLayout, plan: Plan, *, channels_last: bool = True
    ) -> None:
        super().__init__()
        self.plan = plan
        self.call_rows = CallRows(channels_last=channels_last)
        self.guides = CallGuides()
        self.unet = copy_modules(base.unet, _alias)
        self._text_side = rows.text_side
        if added_width(rows.layout):
            self._take_added()
        self._sizes = {name: end - begin for name, begin, end in rows.layout.spans()}
        self._branches = [(t.name, t.rows, t.cols, t.rank) for t in rows.targets]
        self._replace_layers(factors, CrossLayout(rows.layout))
        if plan is Plan.FULL:
            self._guide_attention()
        if channels_last:
            for parameter in self.parameters():
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.eval()

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        context: Tensor,
        adapter_index: Tensor,
        spectral_slab: Tensor | None,
        lowrank_slab: Tensor,
        added: Tensor | None = None,
    ) -> Tensor:
        """Run with rows gathered from slabs, inside the graph.

        sample [N, 4, h, w], timestep [N], context [N, tokens, width] (or cross [N, tokens, cross width]),
        adapter_index [N] int64, spectral_slab [slots, spectral_size] fp32 (None under DENSE), lowrank_slab
        [slots, lowrank_size] fp32; for SDXL added [N, width] (what add_embedding gives, or reads if the rows count the
        text side). Returns [N, 4, h, w].
        """
        spectral = None if spectral_slab is None else spectral_slab.index_select(0, adapter_index)
        lowrank = lowrank_slab.index_select(0, adapter_index) if self._branches else None
        with self._scope(spectral, lowrank, shared=False):
            return self._run(sample, timestep, context, added)

    def forward_guided(
        self,
        sample: Tensor,
        timestep: Tensor,
        cross: Tensor,
        adapter_index: Tensor,
        guides: Guides,
        spectral_slab: Tensor,
        lowrank_slab: Tensor,
        added: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the FULL plan; see UNetEngine.denoise_guided. Also returns where the branches acted, [N, h, w] fp32."""
        self.guides.begin(guides, sample.shape[2], sample.shape[3])
        try:
            out = self(sample, timestep, cross, adapter_index, spectral_slab, lowrank_slab, added)
            return out, self.guides.picture()
        finally:
            self.guides.end()
            # The same dict: layers on the kernels look the masks up in it.
            self.call_rows.masks.clear()

    def forward_rows(
        self,
        sample: Tensor,
        timestep: Tensor,
        context: Tensor,
        spectral_rows: Tensor | None,
        lowrank_rows: Tensor | None,
        added: Tensor | None = None,
    ) -> Tensor:
        """Run with given rows, differentiable with respect to them.

        spectral_rows [N or 1, spectral_size] (effective values as in EngineRow; needed under FACTORED, None under
        DENSE), lowrank_rows [N or 1, lowrank_size] or None for no branch; one row serves the whole batch. Both must
        have the same number of rows; `added` as in `forward`. Raises InvalidArgument if the rows do not fit the plan
        or each other, or if SDXL is run without `added`.
        """
        counts = {rows.shape[0] for rows in (spectral_rows, lowrank_rows) if rows is not None}
        if counts - {1, sample.shape[0]} or len(counts) > 1:
            raise InvalidArgument.for_field(
                "rows", f"{sorted(counts)} rows for a batch of {sample.shape[0]}; give 1 each, or one per sample"
            )
        shared = counts == {1}
        with self._scope(spectral_rows, lowrank_rows, shared=shared):
            return self._run(sample, timestep, context, added)

    def _run(self, sample: Tensor, timestep: Tensor, context: Tensor, added: Tensor | None) -> Tensor:
        if self.call_rows.channels_last:
            sample = sample.contiguous(memory_format=torch.channels_last)
        given = {} if added is None else {"added": added}
        out: Tensor = self.unet(
            sample, timestep, encoder_hidden_states=context, added_cond_kwargs=given, return_dict=False
        )[0]
        return out

    def _take_added(self) -> None:
        """Feed `added` where diffusers computes it from pooled text and sizes."""
        unet: Any = self.unet
        if not self._text_side:
            unet.add_embedding = None

        def read(emb: Tensor, encoder_hidden_states: Tensor, added_cond_kwargs: Mapping[str, Tensor]) -> Tensor:
            added = added_cond_kwargs.get("added")
            if added is None:
                raise InvalidArgument.for_field(
                    "added", "absent; an SDXL model reads the embedding of its pooled text and sizes"
                )
            made: Tensor = added if unet.add_embedding is None else unet.add_embedding(added)
            return made.to(emb.dtype)

        unet.get_aug_embed = read

    @contextmanager
    def _scope(self, spectral: Tensor | None, lowrank: Tensor | None, *, shared: bool) -> Iterator[None]:
        if (spectral is None) != (self.plan is Plan.DENSE):
            given = "no" if spectral is None else "a"
            raise InvalidArgument(Reason.INVALID_FIELD, f"{given} spectral row was given to the {self.plan} plan")
        scope = self.call_rows
        scope.shared = shared
        scope.values = {} if spectral is None else split_rows(spectral, self._sizes)
        scope.branches = split_branches(lowrank, self._branches) if lowrank is not None and self._branches else {}
        try:
            yield
        finally:
            scope.values, scope.branches = {}, {}

    def _guide_attention(self) -> None:
        for name, module in self.unet.named_modules():
            if name.endswith(".attn1"):
                module.set_processor(SharedSelfAttention(self.guides))
            elif name.endswith(".attn2"):
                module.set_processor(ConfiningCrossAttention(name, self.guides, self.call_rows))

    def _replace_layers(self, factors: SpectralFactors, cross: CrossLayout) -> None:
        branched = {name for name, *_ in self._branches}
        made: dict[int, nn.Module] = {}
        for name, layer in list(self.unet.named_modules()):
            if not self._text_side and name in cross.spans:
                made[id(layer)] = CrossSlice(*cross.spans[name])
            elif self.plan is not Plan.DENSE and name in self._sizes:
                made[id(layer)] = _factored(name, self.call_rows, layer, factors)
            elif name in branched:
                made[id(layer)] = _branched(name, self.call_rows, layer)
        # By identity, because diffusers may hold one layer under two names.
        for parent in list(self.unet.modules()):
            for key, child in parent._modules.items():
                if child is not None and id(child) in made:
                    parent._modules[key] = made[id(child)]


def _factored(name: str, rows: CallRows, layer: nn.Module, factors: SpectralFactors) -> nn.Module:
    if isinstance(layer, nn.GroupNorm):
        return RowGroupNorm(name, rows, layer)
    if isinstance(layer, nn.LayerNorm):
        return RowLayerNorm(name, rows, layer)
    weight: Tensor = layer.weight  # type: ignore[assignment]  # the layout lists linear and conv layers besides norms
    u, vh = factors.u[name], factors.vh[name]
    if not factors.laid_out:
        u, vh = u.to(weight), vh.to(weight)
    if isinstance(layer, nn.Linear):
        return FactoredLinear(name, rows, layer, u, vh)
    if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros":
        return FactoredConv(name, rows, layer, u, vh)
    raise _unsupported(name, layer)


def _branched(name: str, rows: CallRows, layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return BranchedLinear(name, rows, layer)
    if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.stride == (1, 1) and layer.padding == (0, 0):
        return BranchedConv(name, rows, layer)
    raise _unsupported(name, layer)


def _unsupported(name: str, layer: nn.Module) -> InvalidArgument:
    return InvalidArgument(Reason.MODEL_UNSUPPORTED, f"the UNet's layer {name} ({layer}) cannot be adapted")


def copy_modules(unet: nn.Module, parameter: Callable[[nn.Parameter], nn.Parameter]) -> nn.Module:
    """Copy the modules but not the weights: each parameter of the copy is what `parameter` makes of its own."""
    known: dict[int, object] = {id(own): parameter(own) for own in unet.parameters()}
    known.update({id(buffer): buffer for buffer in unet.buffers()})
    return copy.deepcopy(unet, known)


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter on the same storage."""
    return nn.Parameter(parameter.detach(), requires_grad=False)
