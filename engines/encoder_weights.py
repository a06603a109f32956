"""The text encoder's weights under a mix of adapters: composed, put together once, and kept for the next request.

A prompt is encoded once per request, so tuned weights here cost nothing per step. W' = W + U diag(relu(sigma + delta) -
sigma) V^T is the form of the UNet's kernels (kernels/spectral_reassemble.py): at delta 0 it is W, bit for bit.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.blocks import Weight, layer_weight
from hueshift.engines.base_model import BaseModel
from hueshift.engines.encoder_layers import encoder_parameters, encoders_of, locate_weights
from hueshift.engines.residency_tiers import FlightCache, ResidencyObserver, Tier
from hueshift.engines.svd_cache import EncoderFactors, SpectralFactors

TowerWeights = tuple[Mapping[str, Tensor], ...]
"""For each text encoder the parameters that stand in for its own, by name. Empty: its own."""

# Four users of CLIP-L in fp32, whose 72 matrices have 340 MB, or one of SDXL's two encoders in fp16, which have 1.4 GB.
MAX_BYTES = 3 * 2**29


@dataclass(frozen=True, slots=True)
class EncoderEdits:
    """What a mix of adapters changes in the text encoders; weights are folded in. Absent layers are the base's.

    `deltas` of singular values [rank], `norms` of norm weights [size], and branches A [k, cols], B [rows, k], all fp32.
    Equal by `key`, the SHA-256 of all of it; "" where nothing is changed.
    """

    deltas: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    norms: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    branches: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False)
    key: str = field(init=False)

    def __post_init__(self) -> None:
        """Compute the key."""
        object.__setattr__(self, "key", _content_key(self.tensors()) if self.tensors() else "")

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by what they are."""
        found = {f"delta/{name}": delta for name, delta in self.deltas.items()}
        found |= {f"norm/{name}": shift for name, shift in self.norms.items()}
        for name, (a, b) in self.branches.items():
            found |= {f"branch/{name}/a": a, f"branch/{name}/b": b}
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


def compose_encoder(mix: Sequence[tuple[Adapter, Weight]]) -> EncoderEdits:
    """Compose what weighted adapters of one base change in the text encoders. What adds up to nothing is left out."""
    deltas: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    stacked: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for adapter, weight in mix:
        for into, shifts in ((deltas, adapter.encoder.spectral), (norms, adapter.encoder.norm)):
            for name, shift in shifts.items():
                scaled = layer_weight(weight, name) * shift.float()
                into[name] = into[name] + scaled if name in into else scaled
        for name, parts in adapter.encoder.lowrank.items():
            strength = layer_weight(weight, name) * parts.scale
            if strength != 0:
                a, b = stacked.setdefault(name, ([], []))
                a.append(parts.a.float())
                b.append(parts.b.float() * strength)
    return EncoderEdits(
        deltas={name: delta for name, delta in deltas.items() if bool(delta.any())},
        norms={name: shift for name, shift in norms.items() if bool(shift.any())},
        branches={name: (torch.cat(a, 0), torch.cat(b, 1)) for name, (a, b) in stacked.items()},
    )


class EncoderAssembly:
    """Puts changed weights of a base's text encoders together, on the device and in the dtype of their own."""

    def __init__(self, base: BaseModel, factors: Callable[[], SpectralFactors] | None) -> None:
        """`factors` gives the decomposition of the encoders when a shift first needs it; None decomposes then."""
        encoders = encoders_of(base)
        self._parameters = [dict(encoder.named_parameters()) for encoder in encoders]
        self._places = locate_weights(encoders)
        self._factors = factors or EncoderFactors(base)

    def put_together(
        self,
        deltas: Mapping[str, Tensor],
        norms: Mapping[str, Tensor],
        branches: Mapping[str, tuple[Tensor, Tensor]],
    ) -> TowerWeights:
        """Return W + U diag(relu(sigma + delta) - sigma) V^T + B A and w + shift of the layers that have such parts.

        Names are those of the base layout. Computed in fp32; differentiable with respect to all of them. Raises
        what loading the decomposition raises.
        """
        factors = self._factors() if deltas else None
        made: tuple[dict[str, Tensor], ...] = tuple({} for _ in self._parameters)
        for name in dict.fromkeys((*deltas, *norms, *branches)):
            tower, parameter = self._places[name]
            base = self._parameters[tower][parameter].detach()
            weight = base.float()
            if factors is not None and name in deltas:
                sigma = factors.sigma[name].to(weight.device)
                shift = (sigma + deltas[name].to(sigma)).relu() - sigma
                weight = weight + (factors.u[name].to(sigma) * shift) @ factors.vh[name].to(sigma)
            if name in norms:
                weight = weight + norms[name].to(weight)
            if name in branches:
                a, b = branches[name]
                weight = weight + b.to(weight) @ a.to(weight)
            made[tower][parameter] = weight.to(base)
        return made


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    weights: TowerWeights

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tower in self.weights for tensor in tower.values())


class EncoderWeights:
    """Weights of the text encoders by what changes them, least recently used out first. Safe for several threads.

    All requests with one content share one assembly; what is larger than `max_bytes` is put together each time.
    """

    def __init__(
        self,
        base: BaseModel,
        factors: Callable[[], SpectralFactors] | None = None,
        *,
        max_bytes: int = MAX_BYTES,
        observer: ResidencyObserver | None = None,
    ) -> None:
        self._assembly = EncoderAssembly(base, factors)
        self._kept: FlightCache[EncoderEdits, _Kept] = FlightCache(
            Tier.ENCODER, self._make, max_bytes, observer or _Unheard()
        )

    @torch.no_grad()
    def get(self, edits: EncoderEdits) -> TowerWeights:
        """Return the weights for a mix; nothing where it changes nothing. Raises what loading factors raises."""
        return self._kept.get(edits).weights if edits.key else ()

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return self._kept.nbytes

    def _make(self, edits: EncoderEdits) -> _Kept:
        made = _Kept(self._assembly.put_together(edits.deltas, edits.norms, edits.branches))
        # Whoever takes them from the cache may run on another stream.
        for device in {tensor.device for tower in made.weights for tensor in tower.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return made


def most_bytes(base: BaseModel, max_bytes: int = MAX_BYTES) -> int:
    """Bytes that EncoderWeights may take: what it keeps, and one mix that is being put together."""
    return max_bytes + sum(weight.numel() * weight.element_size() for weight in encoder_parameters(base).values())


class _Unheard:
    """Hears nothing: tests and offline drawing have no metrics."""

    def looked_up(self, tier: Tier, *, hit: bool) -> None:
        """Hear of a lookup."""

    def loaded(self, tier: Tier, seconds: float) -> None:
        """Hear of a load."""

    def evicted(self, tier: Tier) -> None:
        """Hear of an eviction."""

    def holds(self, tier: Tier, entries: int, nbytes: int) -> None:
        """Hear of the contents."""


def _content_key(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
