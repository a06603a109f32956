"""Keys and values of cross-attention, computed once per request: the UNet takes them as an input.

They depend on the prompt and the adapters only, not on the picture, so nothing that personalises the text side (words,
K/V deltas, gated edits, shifts of to_k and to_v) costs anything per step or couples the samples of a batch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from hueshift.adapters.adapter import GatedEdit
from hueshift.adapters.layout import BaseLayout
from hueshift.engines.base_model import BaseModel
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.transfer import to_device


@dataclass(frozen=True)
class CrossLayout:
    """Where each layer's keys and values lie in a `cross` row [tokens, width], in the order the UNet runs its layers.

    `spans` maps `<attention>.to_k` and `<attention>.to_v` to (begin, end). It is the same for every adapter.
    """

    layout: BaseLayout
    attentions: tuple[str, ...] = field(init=False)
    spans: Mapping[str, tuple[int, int]] = field(init=False)
    width: int = field(init=False)

    def __post_init__(self) -> None:
        """Lay the layers out one after another."""
        rows = {layer.name: layer.rows for layer in self.layout.matrices}
        spans: dict[str, tuple[int, int]] = {}
        position = 0
        attentions = self.layout.cross_attentions
        for name in (f"{attention}.{part}" for attention in attentions for part in ("to_k", "to_v")):
            spans[name] = (position, position + rows[name])
            position += rows[name]
        object.__setattr__(self, "attentions", attentions)
        object.__setattr__(self, "spans", spans)
        object.__setattr__(self, "width", position)


@dataclass(frozen=True, slots=True, eq=False)
class CrossEdits:
    """What a mix of adapters changes in layers of the text side; weights are folded in. Absent layers are the base's.

    `shifts` [rank] are relu(sigma + delta) - sigma; `branches` are A [k, cols] and B [rows, k]; `deltas` [rows, cols]
    are added to the weights; `gated` are Perfusion's edits of a layer with their weights. All fp32.
    """

    shifts: Mapping[str, Tensor] = field(default_factory=dict)
    branches: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    deltas: Mapping[str, Tensor] = field(default_factory=dict)
    gated: Mapping[str, tuple[tuple[GatedEdit, float], ...]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [*self.shifts.values(), *self.deltas.values(), *(t for pair in self.branches.values() for t in pair)]
        tensors += [edit.outputs[name] for name, edits in self.gated.items() for edit, _ in edits]
        return sum(t.numel() * t.element_size() for t in tensors)


class CrossStage:
    """Projects encoded prompts to keys and values with the base's weights and a mix's edits. Safe for several threads.

    A result depends on its own prompt and mix alone, so a picture's does not change with its batch.
    """

    def __init__(self, base: BaseModel, factors: SpectralFactors) -> None:
        self.layout = CrossLayout(base.layout)
        self._layers = EditedLayers(base, factors, self.layout.spans)

    @torch.no_grad()
    def project(self, keys: Tensor, values: Tensor, edits: CrossEdits) -> Tensor:
        """Return `cross` [n, tokens, layout.width] fp32 of the contexts that keys and values see, mostly one and the
        same.

        A context [n, tokens, width] fp32 serves all layers; [layers, n, tokens, width] has one for each, in the order
        of `layout.attentions`.
        """
        out = keys.new_empty(*keys.shape[-3:-1], self.layout.width)
        for number, attention in enumerate(self.layout.attentions):
            for part, context in (("to_k", keys), ("to_v", values)):
                begin, end = self.layout.spans[f"{attention}.{part}"]
                x = context[number] if context.dim() == 4 else context
                out[..., begin:end] = self._layers.run(f"{attention}.{part}", x, edits)
        return out


class EditedLayers:
    """Linear layers of the base's UNet by name, run with the edits of a mix instead of the rows of an engine.

    Singular vectors come to the weights' device with the first mix that shifts their layer, and stay there: all of them
    are 125 MB in SD1.5 and 2.2 GB in SDXL, and every prompt would wait for that much to be copied otherwise.
    """

    def __init__(self, base: BaseModel, factors: SpectralFactors, names: Iterable[str]) -> None:
        self._factors = factors
        self._placed: dict[str, tuple[Tensor, Tensor]] = {}
        parameters = dict(base.unet.named_parameters())
        # fp32 whatever the base is held in: it runs once per request, and is 2 % of SD1.5's UNet (13 % of SDXL's,
        # 1.4 GB).
        self._weights = {name: parameters[f"{name}.weight"].detach().float() for name in names}
        self._biases = {
            name: None if (bias := parameters.get(f"{name}.bias")) is None else bias.detach().float()
            for name in self._weights
        }

    def run(self, name: str, x: Tensor, edits: CrossEdits) -> Tensor:
        """Map x [..., cols] fp32 to [..., rows]."""
        weight = self._weights[name]
        out = functional.linear(x, weight, self._biases[name])
        shift = edits.shifts.get(name)
        if shift is not None:
            # W' = W + U diag(shift) V^T, applied to x without being formed.
            u, vh = self._vectors(name)
            out = out + functional.linear(functional.linear(x, vh) * _beside(shift, x), u)
        branch = edits.branches.get(name)
        if branch is not None:
            a, b = (_beside(part, x) for part in branch)
            out = out + functional.linear(functional.linear(x, a), b)
        delta = edits.deltas.get(name)
        if delta is not None:
            out = out + functional.linear(x, _beside(delta, x))
        for edit, strength in edits.gated.get(name, ()):
            out = out + strength * gated_change(edit, name, weight, x)
        return out

    def _vectors(self, name: str) -> tuple[Tensor, Tensor]:
        """U and V^T of a layer beside its weight: copied when this returns, so any stream may read them."""
        placed = self._placed.get(name)
        if placed is None:
            weight = self._weights[name]
            placed = self._placed[name] = (self._factors.u[name].to(weight), self._factors.vh[name].to(weight))
        return placed


def _beside(part: Tensor, x: Tensor) -> Tensor:
    """An adapter's part where x lies. One that was waited for would be waited for layer by layer, each time behind what
    the steps have on the device. Large ones lie in page-locked memory already (engines/residency_host.py).
    """
    return to_device(part, x.device).to(x.dtype)


def gated_change(edit: GatedEdit, name: str, weight: Tensor, x: Tensor) -> Tensor:
    """What Perfusion adds to W x for tokens x [..., width]: g(x) o* - s(x) W i* (Tewel et al. 2023, equation 5)."""
    target, dual = _beside(edit.target, x), _beside(edit.dual, x)
    share = (x @ dual / (dual @ target))[..., None]
    gate = torch.sigmoid((share - edit.beta) / edit.tau)
    return gate * _beside(edit.outputs[name], x) - share * (weight @ target)
