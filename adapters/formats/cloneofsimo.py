"""LoRA of the `lora` program by cloneofsimo: `unet:<n>:up` and `unet:<n>:down`, with learned words beside them.

n counts the linear layers inside modules of the classes that the metadata lists, in the order in which the diffusers of
that time held them: down blocks, up blocks, then the middle; in a transformer block self-attention, feed-forward,
cross-attention (later versions: feed-forward last, which the shapes tell). Real files of both SD 1.x releases of the
program confirm it. The change is up times down; a scale is chosen when it is used, so ours is 1.
"""

import json
import re
from collections.abc import Iterator

from hueshift.adapters.container import invalid, parse_json
from hueshift.adapters.formats.draft import TEXT_ENCODER, Draft
from hueshift.adapters.formats.foreign_module import ForeignModule
from hueshift.adapters.formats.modules import add_module
from hueshift.adapters.formats.source import ForeignFile
from hueshift.adapters.formats.words import take_words
from hueshift.adapters.layout import BaseLayout, MatrixLayer

_KEY = re.compile(r"(unet|text_encoder):(\d{1,5}):(up|down)")
_ATTENTION = ("CrossAttention", "Attention")
_CLASSES = (*_ATTENTION, "GEGLU", "ResnetBlock2D")
_CLIP_CLASSES = ["CLIPAttention"]
_CLIP_PROJECTIONS = ("k_proj", "v_proj", "q_proj", "out_proj")
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
_ORDERS = (("attn1", "ff.net.0", "attn2"), ("attn1", "attn2", "ff.net.0"))


def read(draft: Draft, source: ForeignFile) -> None:
    """Add every numbered pair to the draft."""
    pairs: dict[int, dict[str, str]] = {}
    text_pairs: dict[int, dict[str, str]] = {}
    for key in source.entries:
        found = _KEY.fullmatch(key)
        if found and found[1] == "text_encoder":
            text_pairs.setdefault(int(found[2]), {})[found[3]] = key
        elif found:
            pairs.setdefault(int(found[2]), {})[found[3]] = key
    layers = _numbered_layers(draft, source, pairs) if pairs else []
    for number in sorted(pairs):
        if number < len(layers):
            add_module(draft, ForeignModule(layers[number].name, pairs[number], source), lambda _rank: 1.0)
    _read_encoder(draft, source, text_pairs)
    take_words(draft, source)


def _numbered_layers(draft: Draft, source: ForeignFile, pairs: dict[int, dict[str, str]]) -> list[MatrixLayer]:
    """The layers in the file's order: that of the known orders which fits most shapes."""
    classes = _classes(source)
    orders = [list(_layers_of(draft.base.layout, classes, order)) for order in _ORDERS]

    def misfits(layers: list[MatrixLayer]) -> int:
        fits = 0
        for number, layer in enumerate(layers):
            keys = pairs.get(number, {})
            shapes = [source.entries[key].shape for key in keys.values()]
            rows = source.entries[keys["up"]].shape[:1] if "up" in keys else ()
            fits += bool(shapes) and rows == (layer.rows,)
        return len(pairs) - fits

    return min(orders, key=misfits)


def _read_encoder(draft: Draft, source: ForeignFile, pairs: dict[int, dict[str, str]]) -> None:
    """Add the pairs of the text encoder, whose attention CLIP holds as keys, values, queries and output."""
    attentions = [layer.name for layer in draft.base.layout.encoder_matrices if ".self_attn." in layer.name]
    blocks = dict.fromkeys(name.rpartition(".")[0] for name in attentions)
    layers = [f"{block}.{projection}" for block in blocks for projection in _CLIP_PROJECTIONS]
    counted = parse_json(source.metadata.get("text_encoder", json.dumps(_CLIP_CLASSES)), "the metadata 'text_encoder'")
    for number, keys in sorted(pairs.items()):
        if counted == _CLIP_CLASSES and number < len(layers):
            add_module(draft, ForeignModule(layers[number], keys, source), lambda _rank: 1.0)
            continue
        for key in keys.values():
            source.skip(key)
            draft.leave_out([key], TEXT_ENCODER)


def _classes(source: ForeignFile) -> list[str]:
    classes = parse_json(source.metadata.get("unet", '["CrossAttention", "Attention", "GEGLU"]'), "the metadata 'unet'")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise invalid("the metadata 'unet' must list class names")
    unknown = [name for name in classes if name not in _CLASSES]
    if unknown:
        raise invalid(f"its layers are counted in modules of class {unknown[0][:80]!r}; allowed: {', '.join(_CLASSES)}")
    return classes


def _layers_of(layout: BaseLayout, classes: list[str], order: tuple[str, ...]) -> Iterator[MatrixLayer]:
    by_name = {layer.name: layer for layer in layout.matrices}
    seen: set[str] = set()
    for layer in layout.matrices:
        block = re.match(r"(.*\.transformer_blocks\.\d+)\.|(.*\.resnets\.\d+)\.", layer.name)
        if block is None or block[0] in seen:
            continue
        seen.add(block[0])
        if block[1] is not None:
            yield from (by_name[name] for name in _names_in(block[1], classes, order) if name in by_name)
        elif "ResnetBlock2D" in classes:
            inner = ("conv1", "time_emb_proj", "conv2", "conv_shortcut")
            yield from (by_name[f"{block[2]}.{name}"] for name in inner if f"{block[2]}.{name}" in by_name)


def _names_in(block: str, classes: list[str], order: tuple[str, ...]) -> Iterator[str]:
    for module in order:
        if module == "ff.net.0" and "GEGLU" in classes:
            yield f"{block}.{module}.proj"
        elif module != "ff.net.0" and any(name in classes for name in _ATTENTION):
            yield from (f"{block}.{module}.{projection}" for projection in _PROJECTIONS)
