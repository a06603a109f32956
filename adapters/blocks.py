"""Weights by block: how strongly an adapter acts in each part of the UNet.

SVDiff (Han et al. 2023, style mixing) mixes the structure of one picture with the appearance of another by taking some
blocks' shifts from one adapter and the rest from the other. Its structure blocks lie on the way down where the feature
maps of a 512 pixel picture are 16 and 8 wide; here these are the last two down blocks, whatever the base model's size.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from hueshift.adapters.errors import FieldViolation, InvalidArgument, Reason
from hueshift.adapters.layout import BaseLayout

STRUCTURE = "structure"
APPEARANCE = "appearance"
# SD 1.x has 32 attentions and resnets that one may wish to name.
MAX_BLOCKS = 64
_DOWN = "down_blocks"


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """A weight for every layer, by the dotted prefix of its name; "" is the prefix of all.

    The longest prefix counts, and a layer that none fits has weight 0. `entries` are sorted by prefix.
    """

    entries: tuple[tuple[str, float], ...]

    def of(self, layer: str) -> float:
        """Return the weight of a layer."""
        found, weight = -1, 0.0
        for prefix, value in self.entries:
            if len(prefix) > found and _is_within(layer, prefix):
                found, weight = len(prefix), value
        return weight


Weight: TypeAlias = float | BlockWeights
"""One weight for all layers, or weights by block."""


def layer_weight(weight: Weight, layer: str) -> float:
    """Return the weight of a layer."""
    return weight.of(layer) if isinstance(weight, BlockWeights) else weight


def scale_weight(weight: Weight, factor: float) -> Weight:
    """Return the weight times `factor`, canonical as those of `add_weights`."""
    if isinstance(weight, BlockWeights):
        return _simplify({prefix: value * factor for prefix, value in weight.entries})
    return weight * factor


def add_weights(first: Weight, second: Weight) -> Weight:
    """Return the sum. Prefixes that change nothing are left out, and a sum that is equal everywhere is a number."""
    if not isinstance(first, BlockWeights) and not isinstance(second, BlockWeights):
        return first + second
    prefixes = {prefix for weight in (first, second) for prefix, _ in _entries(weight)}
    return _simplify({prefix: layer_weight(first, prefix) + layer_weight(second, prefix) for prefix in prefixes})


def complement(weight: Weight) -> Weight:
    """Return 1 minus the weight, canonical as `add_weights`."""
    return add_weights(1.0, scale_weight(weight, -1.0))


def block_names(layout: BaseLayout) -> tuple[str, ...]:
    """Return the names of the large blocks: of the UNet, `conv_in`, ..., `down_blocks.0`, ..., then text encoders."""
    return tuple(dict.fromkeys(map(_block_of, _layer_names(layout))))


def structure_blocks(layout: BaseLayout) -> tuple[str, ...]:
    """Return what the preset `structure` stands for: the last two down blocks; none in a UNet with less than two."""
    down = [name for name in block_names(layout) if name.startswith(f"{_DOWN}.")]
    return tuple(down[-2:]) if len(down) >= 2 else ()


def resolve_blocks(given: Mapping[str, float], layout: BaseLayout, field: str = "block_weights") -> Weight:
    """Return the weights that `given` means for the base model of `layout`.

    Names are dotted prefixes of layer names (`mid_block`, `up_blocks.1`, `up_blocks.1.attentions.0`, `text_encoder`),
    or `structure` and `appearance`, which is every layer outside of `structure`, those of text encoders too. A named
    block wins over those two, a longer name over a shorter one, and what is not named has weight 0. Equal weights of
    all layers come out equal, whatever was given: a number if all layers have the same, else the fewest prefixes.

    Raises InvalidArgument with a violation of `field` for every name that is no block.
    """
    _check_names(given, layout, field)
    structure = BlockWeights(tuple((name, float(given.get(STRUCTURE, 0.0))) for name in structure_blocks(layout)))
    named = BlockWeights(tuple((name, float(given[name])) for name in given if name not in (STRUCTURE, APPEARANCE)))

    def weight_of(layer: str) -> float:
        if any(_is_within(layer, prefix) for prefix, _ in named.entries):
            return named.of(layer)
        if any(_is_within(layer, prefix) for prefix, _ in structure.entries):
            return structure.of(layer)
        return float(given.get(APPEARANCE, 0.0))

    return _simplify(dict(_uniform({name: weight_of(name) for name in _layer_names(layout)}, "")))


def _check_names(given: Mapping[str, float], layout: BaseLayout, field: str) -> None:
    if len(given) > MAX_BLOCKS:
        raise InvalidArgument.for_field(field, f"{len(given)} blocks given; allowed: at most {MAX_BLOCKS}")
    layers = _layer_names(layout)
    presets = (STRUCTURE, APPEARANCE) if structure_blocks(layout) else ()
    allowed = ", ".join((*presets, *block_names(layout)))
    example = max((name for name, _, _ in layout.spans()), key=lambda layer: layer.count(".")).rpartition(".")[0]
    violations = [
        FieldViolation(
            f"{field}[{name[:80]!r}]",
            f"no layer's name begins so; allowed: {allowed}, or longer prefixes of layer names such as {example}",
        )
        for name in given
        if name not in presets and not (name and any(_is_within(layer, name) for layer in layers))
    ]
    if violations:
        text = "; ".join(f"{v.field}: {v.description}" for v in violations)
        raise InvalidArgument(Reason.INVALID_FIELD, text, violations=violations)


def _layer_names(layout: BaseLayout) -> list[str]:
    return [*(name for name, _, _ in layout.spans()), *layout.encoder_names()]


def _uniform(weights: Mapping[str, float], prefix: str) -> Iterable[tuple[str, float]]:
    """Yield the largest subtrees of layer names whose layers all have one weight, with it."""
    values = set(weights.values())
    if len(values) == 1:
        yield prefix, values.pop()
        return
    children: dict[str, dict[str, float]] = {}
    begin = len(prefix) + 1 if prefix else 0
    for name, weight in weights.items():
        end = name.find(".", begin)
        children.setdefault(name if end < 0 else name[:end], {})[name] = weight
    for child, part in children.items():
        yield from _uniform(part, child)


def _simplify(values: Mapping[str, float]) -> Weight:
    kept = BlockWeights(())
    for prefix in sorted(values, key=lambda name: (len(name), name)):
        if values[prefix] != kept.of(prefix):
            kept = BlockWeights((*kept.entries, (prefix, values[prefix])))
    if not kept.entries:
        return 0.0
    if [prefix for prefix, _ in kept.entries] == [""]:
        return kept.entries[0][1]
    return BlockWeights(tuple(sorted(kept.entries)))


def _entries(weight: Weight) -> tuple[tuple[str, float], ...]:
    return weight.entries if isinstance(weight, BlockWeights) else (("", weight),)


def _is_within(layer: str, prefix: str) -> bool:
    return not prefix or layer == prefix or layer.startswith(f"{prefix}.")


def _block_of(layer: str) -> str:
    head, _, rest = layer.partition(".")
    return f"{head}.{rest.partition('.')[0]}" if head.endswith("_blocks") else head
