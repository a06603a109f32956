"""Custom Diffusion (Kumari et al. 2023) as diffusers saves it: whole K and V matrices of the cross-attentions.

Keys read `<attention>.processor.to_k_custom_diffusion.weight`; files of the crossattn variant also hold q and out. They
replace the base's matrices, so the change is their difference to it. Learned words may lie beside them.

diffusers loads a file only if it names every attention; those without weights have an empty tensor `<attention>.
processor`, which safetensors files that diffusers writes lack.
"""

import re

import torch
from torch import Tensor

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.formats.draft import BIAS, Draft, ImportBase
from hueshift.adapters.formats.exports import BASE_HASH_KEY, Leftovers
from hueshift.adapters.formats.source import ForeignFile
from hueshift.adapters.formats.words import take_words
from hueshift.adapters.tensors import pack

_KEY = re.compile(r"(.+)\.processor\.to_(k|v|q|out)_custom_diffusion(\.0)?\.(weight|bias)")


def read(draft: Draft, source: ForeignFile) -> None:
    """Add the difference of every matrix to the base's own.

    Keys and values become deltas that cost nothing per step, whole; with a rank asked for, low-rank parts as q and out.
    """
    projections = {f"{name}.{side}" for name in draft.base.layout.cross_attentions for side in ("to_k", "to_v")}
    for key, entry in source.entries.items():
        if key.endswith(".processor") and 0 in entry.shape:
            # Marks an attention without weights of its own.
            source.skip(key)
            continue
        found = _KEY.fullmatch(key)
        layer = draft.locate(f"{found[1]}.to_{found[2]}{found[3] or ''}") if found else None
        if found is None or layer is None:
            continue
        tensor = source.read(key)
        base = draft.base.parameter(f"{layer}.{found[4]}")
        if tensor.shape != base.shape:
            raise InvalidArgument(
                Reason.ADAPTER_SHAPE_MISMATCH,
                f"adapter file refused: tensor {key!r} has shape {list(tensor.shape)}, but the base model's {layer!r} "
                f"has {list(base.shape)}; it was made for another base model",
            )
        difference = tensor.double() - base.double()
        if layer in projections and found[4] == "weight" and not draft.options.rank:
            draft.add_kv(draft.matrices[layer], difference)
        elif found[4] == "weight":
            draft.add_delta(draft.matrices[layer], difference, "dense")
        elif bool(difference.any()):
            draft.leave_out([key], BIAS)
    take_words(draft, source)


def write(adapter: Adapter, base: ImportBase, left: Leftovers) -> bytes:
    """Write W + delta, rounded to fp32, for both keys and values of every attention that has a delta.

    Imported again, a delta differs by that rounding: by 2^-24 of the weight's own size at most. Raises
    FailedPrecondition (ADAPTER_BASE_MISMATCH) without the base's weights.
    """
    left.refuse("spectral shifts", adapter.spectral)
    left.refuse("low-rank parts", adapter.lowrank)
    left.refuse("shifts of norms", adapter.norm)
    left.refuse("learned words", adapter.tokens, ", which diffusers keeps in files of their own")
    changed = {name.rpartition(".")[0] for name in adapter.kv}
    tensors: dict[str, Tensor] = {}
    for attention in (layer.name.rpartition(".")[0] for layer in base.layout.matrices if layer.name.endswith(".to_k")):
        if attention not in changed:
            tensors[f"{attention}.processor"] = torch.empty(0)
            continue
        for side in ("to_k", "to_v"):
            weight = base.parameter(f"{attention}.{side}.weight").double()
            delta = adapter.kv.get(f"{attention}.{side}")
            whole = weight if delta is None else weight + delta.double()
            tensors[f"{attention}.processor.{side}_custom_diffusion.weight"] = whole.float()
    return pack(tensors, {"format": "pt", BASE_HASH_KEY: adapter.base_hash})
