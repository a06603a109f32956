"""LAG sampling and StyleAligned written out plainly on diffusers' own UNet: what the full plan must equal."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from tiny_unet import WIDTH, TinyParts, merge_row
from torch import Tensor, nn
from torch.nn import functional

from hueshift.engines.adapted_layers import CrossSlice
from hueshift.engines.base_model import read_layout
from hueshift.engines.cross_attention import CrossLayout
from hueshift.engines.interface import EngineRow


class TwoPasses:
    """The base's features and the merged ones at every adapted layer, blended by masks made from probabilities.

    f = (1 - M) W x + M W' x (Ham et al. 2024), for one row of an engine and for the rows of one call. `lag` [N, tokens]
    are the tokens of each row, `source` the row whose mask it takes.
    """

    def __init__(self, parts: TinyParts, row: EngineRow, lag: Tensor, source: Sequence[int]) -> None:
        self._lag, self._source = lag, list(source)
        self._shares: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}
        self._unet = _sliced(parts, EngineRow(spectral=row.spectral))
        merged = _sliced(parts, row)
        for target in parts.rows.targets:
            layer = self._unet.get_submodule(target.name)
            layer.register_forward_hook(self._blend(target.name, merged.get_submodule(target.name)))
        for name, module in self._unet.named_modules():
            if name.endswith(".attn2"):
                module.register_forward_pre_hook(self._remember, with_kwargs=True)
                # Registered after the blending hook of to_q, so it sees the query that attention sees.
                module.to_q.register_forward_hook(self._look(name, module))

    def __call__(self, sample: Tensor, timestep: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the mean of the masks at the sample's resolution."""
        self._shares, self.masks = {}, {}
        with torch.no_grad():
            out: Tensor = self._unet(sample, timestep, encoder_hidden_states=cross, return_dict=False)[0]
        height, width = sample.shape[2:]
        grown = []
        for mask in self.masks.values():
            factor = int((height * width / mask.shape[1]) ** 0.5)
            grid = mask.view(-1, height // factor, width // factor)
            grown.append(grid.repeat_interleave(factor, 1).repeat_interleave(factor, 2))
        return out, torch.stack(grown).mean(0)

    def _remember(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._cross = kwargs["encoder_hidden_states"]

    def _look(self, name: str, attention: Any) -> Any:
        def hook(_layer: nn.Module, _args: Any, query: Tensor) -> None:
            key = attention.to_k(self._cross)
            rows, positions = query.shape[:2]
            heads = attention.heads
            width = query.shape[2] // heads
            share = torch.zeros(rows, positions)
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                scores = query[..., part] @ key[..., part].transpose(1, 2) / width**0.5
                share += (scores.softmax(-1) * self._lag[:, None, :]).sum(-1) / heads
            at = _transformer(name)
            self._shares[at] = self._shares.get(at, torch.zeros(())) + share
            # At least half of the positions: those not below the value in the middle of the sorted map.
            middle = self._shares[at].sort(1).values[:, positions // 2]
            self.masks[at] = (self._shares[at] >= middle[:, None]).float()[self._source]

        return hook

    def _blend(self, name: str, merged: nn.Module) -> Any:
        def hook(_layer: nn.Module, args: tuple[Tensor, ...], base: Tensor) -> Tensor:
            changed: Tensor = merged(*args)
            mask = self.masks.get(_transformer(name))
            if mask is None:
                return changed
            mask = mask.view(-1, 1, *base.shape[2:]) if base.dim() == 4 else mask[:, :, None]
            return (1 - mask) * base + mask * changed

        return hook


def style_aligned(
    parts: TinyParts, row: EngineRow, sample: Tensor, timestep: Tensor, cross: Tensor, reference: Sequence[int]
) -> Tensor:
    """Output of rows that share the self-attention of others (Hertz et al. 2023, section 4.1), one by one."""
    unet: Any = _sliced(parts, row)
    for name, module in unet.named_modules():
        if name.endswith(".attn1"):
            module.set_processor(_Shared(list(reference)))
    with torch.no_grad():
        out: Tensor = unet(sample, timestep, encoder_hidden_states=cross, return_dict=False)[0]
    return out


class _Shared:
    def __init__(self, reference: list[int]) -> None:
        self._reference = reference

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        query, key, value = (
            layer(hidden_states).unflatten(2, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        rows = []
        for number, other in enumerate(self._reference):
            q, k, v = query[number], key[number], value[number]
            if other != number:
                q, k = _adain(q, query[other]), torch.cat([key[other], _adain(k, key[other])])
                v = torch.cat([value[other], v])
            scores = torch.einsum("phd,khd->hpk", q, k) / q.shape[2] ** 0.5
            rows.append(torch.einsum("hpk,khd->phd", scores.softmax(-1), v).flatten(1))
        out: Tensor = attn.to_out[0](torch.stack(rows))
        return out


def _adain(x: Tensor, style: Tensor) -> Tensor:
    """[positions, heads, width]: instance normalisation over positions, then the style's statistics."""
    normal = functional.instance_norm(x.permute(1, 2, 0), eps=1e-5).permute(2, 0, 1)
    deviation = (style.var(0, correction=0) + 1e-5).sqrt()
    return normal * deviation + style.mean(0)


def _sliced(parts: TinyParts, row: EngineRow) -> nn.Module:
    """diffusers' UNet with the row merged into its weights, whose cross-attention reads keys and values."""
    unet: nn.Module = copy.deepcopy(parts.base.unet)
    merge_row(unet, parts, row)
    layout = CrossLayout(read_layout(unet, "", WIDTH))
    for name, span in layout.spans.items():
        attention, _, part = name.rpartition(".")
        setattr(unet.get_submodule(attention), part, CrossSlice(*span))
    return unet


def _transformer(layer: str) -> str:
    parts = layer.split(".")
    return ".".join(parts[: parts.index("attentions") + 2])
