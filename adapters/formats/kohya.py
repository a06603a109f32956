"""Flat layer names: LoRA and LoCon of the kohya programs, and everything of LyCORIS.

Keys read `lora_unet_<layer with _ for .>.<ending>` (LyCORIS' own wrapper: `lycoris_<layer>`); `lora_te*_` is the text
encoder. Endings are lora_down, lora_up and lora_mid with `.weight`, alpha, dora_scale, hada_*, lokr_*, diff, diff_b,
w_norm and b_norm. Learned words may travel along as `bundle_emb.<word>.string_to_param.*`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.dense_deltas import with_product
from hueshift.adapters.formats.draft import TEXT_ENCODER, Draft
from hueshift.adapters.formats.exports import BASE_HASH_KEY, Leftovers
from hueshift.adapters.formats.foreign_module import ForeignModule
from hueshift.adapters.formats.modules import ROLES, add_module, alpha_scale
from hueshift.adapters.formats.source import ForeignFile
from hueshift.adapters.formats.spelling import Part, split_part
from hueshift.adapters.formats.words import take_words
from hueshift.adapters.layout import ENCODERS, BaseLayout
from hueshift.adapters.tensors import pack

_ROLE_OF = {"lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid"} | {
    role: role for role in ROLES if role not in ("down", "up", "mid", "magnitude", "bias")
}


def read(draft: Draft, source: ForeignFile) -> None:
    """Add every module of the file to the draft."""
    modules: dict[str, dict[str, str]] = {}
    for key in source.entries:
        module, _, ending = key.partition(".")
        if split_part(module)[0] is Part.TEXT and draft.locate(module) is None:
            source.skip(key)
            draft.leave_out([key], TEXT_ENCODER)
        elif ending in _ROLE_OF and draft.locate(module) is not None:
            modules.setdefault(module, {})[_ROLE_OF[ending]] = key
    for module, keys in modules.items():
        layer = draft.locate(module)
        if layer is not None:
            found = ForeignModule(layer, keys, source)
            add_module(draft, found, alpha_scale(found))
    take_words(draft, source)


def write(adapter: Adapter, layout: BaseLayout, left: Leftovers) -> bytes:
    """Write low-rank parts, full deltas, norm shifts and words. alpha is scale * rank, as a kohya program divides it.

    A module has one form: where a layer has a delta and a low-rank part, the `diff` is of both, in fp32.
    """
    encoder, flat = adapter.encoder, _Flat(two_encoders=len(layout.token_parts) > 1)
    left.refuse("spectral shifts", [*adapter.spectral, *encoder.spectral])
    lowrank, norms = {**adapter.lowrank, **encoder.lowrank}, {**adapter.norm, **encoder.norm}
    whole = {**adapter.dense, **adapter.kv}
    tensors: dict[str, Tensor] = {}
    for layer in (*layout.matrices, *layout.encoder_matrices):
        if layer.name in whole:
            delta = whole[layer.name]
            if layer.name in lowrank:
                delta = with_product(delta, lowrank[layer.name]).float()
            tensors[f"{flat(layer.name)}.diff"] = delta.reshape(layer.weight_shape)
        elif layer.name in lowrank:
            part, name = lowrank[layer.name], flat(layer.name)
            kernel = (1, 1) if layer.is_conv else ()
            tensors[f"{name}.lora_down.weight"] = part.a.reshape(part.rank, *layer.weight_shape[1:])
            tensors[f"{name}.lora_up.weight"] = part.b.reshape(layer.rows, part.rank, *kernel)
            tensors[f"{name}.alpha"] = torch.tensor(part.scale * part.rank)
    for layer_name, shift in norms.items():
        tensors[f"{flat(layer_name)}.w_norm"] = shift
    for word, vectors in adapter.tokens.items():
        tensors[f"bundle_emb.{word}.string_to_param.*"] = vectors
    ranks = {part.rank for part in lowrank.values()}
    metadata = {"ss_network_module": "lycoris.kohya" if norms or whole else "networks.lora"}
    if len(ranks) == 1:
        metadata["ss_network_dim"] = str(ranks.pop())
    return pack(tensors, {**metadata, BASE_HASH_KEY: adapter.base_hash})


@dataclass(frozen=True, slots=True)
class _Flat:
    """Names of layers as kohya programs write them."""

    two_encoders: bool

    def __call__(self, layer: str) -> str:
        encoder, _, path = layer.partition(".")
        if encoder not in ENCODERS:
            return f"lora_unet_{layer.replace('.', '_')}"
        number = str(ENCODERS.index(encoder) + 1) if self.two_encoders else ""
        return f"lora_te{number}_text_model_{path.replace('.', '_')}"
