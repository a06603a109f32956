"""Dotted layer names: LoRA of diffusers in all its generations, and LoRA, DoRA, LoHa and LoKr of PEFT.

Keys read `[unet.|base_model.model.]<layer><ending>`. Endings, oldest first: `.processor.to_q_lora.down.weight`,
`.to_q.lora.down.weight`, `.lora_linear_layer.down.weight`, `.lora_A[.<name>].weight`, with `.lora_magnitude_vector` for
DoRA. Scales are in the configuration: the metadata `lora_adapter_metadata` (diffusers) or the folder's
adapter_config.json, which travels as the metadata `adapter_config`. Without one, alpha is the rank, as diffusers reads
such files.
"""

import json
import re
from typing import Any

from torch import Tensor

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.formats import loha, lokr
from hueshift.adapters.formats.draft import TEXT_ENCODER, Draft
from hueshift.adapters.formats.exports import BASE_HASH_KEY, Leftovers
from hueshift.adapters.formats.foreign_module import ForeignModule
from hueshift.adapters.formats.modules import ScaleOf, add_module, alpha_scale
from hueshift.adapters.formats.peft_config import PeftConfig, find_config
from hueshift.adapters.formats.source import ForeignFile
from hueshift.adapters.formats.spelling import Part, split_part
from hueshift.adapters.formats.words import take_words
from hueshift.adapters.layout import ENCODERS, BaseLayout, is_encoder_layer
from hueshift.adapters.tensors import pack

METADATA_KEY = "lora_adapter_metadata"
_NAME = r"(?:\.(?!weight$|bias$)[\w-]+)?"
_ENDINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        (rf"\.lora_A{_NAME}\.weight$", "down"),
        (rf"\.lora_B{_NAME}\.weight$", "up"),
        (rf"\.lora_B{_NAME}\.bias$", "bias"),
        (rf"\.lora_magnitude_vector{_NAME}(?:\.weight)?$", "magnitude"),
        (r"(?:\.lora|_lora|\.lora_linear_layer)\.down\.weight$", "down"),
        (r"(?:\.lora|_lora|\.lora_linear_layer)\.up\.weight$", "up"),
        (r"\.lora_down\.weight$", "down"),
        (r"\.lora_up\.weight$", "up"),
        (r"\.lora_mid\.weight$", "mid"),
        (r"(?:\.lora|_lora)?\.alpha$", "alpha"),
        (r"\.dora_scale$", "dora_scale"),
        *((rf"\.{role}{_NAME}$", role) for role in (*loha.ROLES, *lokr.ROLES)),
    )
)


def read(draft: Draft, source: ForeignFile) -> None:
    """Add every module of the file to the draft."""
    modules: dict[str, dict[str, str]] = {}
    for key in source.entries:
        found = _split(key)
        located = found is not None and draft.locate(found[0]) is not None
        if split_part(key)[0] is Part.TEXT and not located:
            source.skip(key)
            draft.leave_out([key], TEXT_ENCODER)
        elif found is not None and located:
            modules.setdefault(found[0], {})[found[1]] = key
    configs = {network: find_config(source, METADATA_KEY, network) for network in ("unet", *ENCODERS)}
    if not any(configs.values()) and modules and not any("alpha" in keys for keys in modules.values()):
        draft.notes.append("the file has no configuration and no alpha: its products are taken with scale 1")
    for module, keys in modules.items():
        layer = draft.locate(module)
        if layer is not None:
            foreign = ForeignModule(layer, keys, source)
            network = layer.partition(".")[0] if is_encoder_layer(layer) else "unet"
            add_module(draft, foreign, _scale_of(foreign, split_part(module)[1], configs[network]))
    take_words(draft, source)


def write(adapter: Adapter, layout: BaseLayout, left: Leftovers) -> bytes:
    """Write low-rank parts as `unet.<layer>.lora_A/B.weight`, with ranks and alphas in the metadata."""
    left.refuse("spectral shifts", adapter.spectral)
    left.refuse("shifts of norms", adapter.norm)
    left.refuse("learned words", adapter.tokens, "; the textual_inversion form holds them")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for layer in layout.matrices:
        part = adapter.lowrank.get(layer.name)
        if part is None:
            continue
        kernel = (1, 1) if layer.is_conv else ()
        tensors[f"unet.{layer.name}.lora_A.weight"] = part.a.reshape(part.rank, *layer.weight_shape[1:])
        tensors[f"unet.{layer.name}.lora_B.weight"] = part.b.reshape(layer.rows, part.rank, *kernel)
        ranks[layer.name], alphas[layer.name] = part.rank, part.scale * part.rank
    config = {f"unet.{key}": value for key, value in _config(ranks, alphas).items()}
    metadata = {METADATA_KEY: json.dumps(config, sort_keys=True), "format": "pt", BASE_HASH_KEY: adapter.base_hash}
    return pack(tensors, metadata)


def _config(ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    # The fields of PEFT's LoraConfig. Patterns name every layer in full, from its beginning.
    rank, alpha = max(ranks.values(), default=1), max(alphas.values(), default=1.0)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{_escape(name)}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{_escape(name)}": value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }


def _escape(name: str) -> str:
    return name.replace(".", r"\.")


def _split(key: str) -> tuple[str, str] | None:
    for pattern, role in _ENDINGS:
        found = pattern.search(key)
        if found:
            return key[: found.start()].replace(".processor.", "."), role
    return None


def _scale_of(module: ForeignModule, name: str, config: PeftConfig | None) -> ScaleOf:
    if "alpha" in module.keys:
        return alpha_scale(module)
    return (lambda _rank: 1.0) if config is None else (lambda rank: config.scale(name, rank))
